"""The model that training began with, for passes without gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from patcher_pl.evaluation.generate import evaluating
from patcher_pl.models import Weights


class BaseModel:
    """The live model, which for a while is again as it was when this was built.

    Where every weight is trained, this keeps one copy of them (where `weight_copies_on` says; with
    FSDP, of this process's part), which takes the place of the weights for the length of a block.
    Under adapters, these are switched off instead, and there is no copy.

    Args:
        model: Before any training.
        weights: Owner of all its weights.
        has_adapters: Whether adapters alone are trained.
    """

    def __init__(self, model: nn.Module, weights: Weights, *, has_adapters: bool) -> None:
        self._model = model
        self._weights = weights
        self._start = None if has_adapters else weights.snapshot()

    def place(self) -> None:
        """Moves the copy to where copies are kept, once the model is where it is trained.

        And to the number format that it is trained in, which Lightning decides late.
        """
        if self._start is not None:
            pairs = zip(self._weights.shards.tensors, self._start, strict=True)
            self._start = self._weights.placed([value.to(tensor.dtype) for tensor, value in pairs])

    @contextmanager
    def in_place(self) -> Iterator[nn.Module]:
        """Lends the base model, in evaluation mode; the model is afterwards as it was.

        Raises:
            RuntimeError: Where weights are shifted, or between a forward pass of a sharded model and
                its backward pass.
        """
        if self._start is None:
            with without_adapters(self._model) as model:
                yield model
            return
        with self._weights.replaced(self._start), evaluating(self._model):
            yield self._model


@contextmanager
def without_adapters(model: Any) -> Iterator[nn.Module]:
    """Lends a `peft` model without what its adapters add to it, in evaluation mode."""
    with model.disable_adapter(), evaluating(model):
        yield model

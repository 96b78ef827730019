"""The one owner of a live model's weights while an attack shifts them back and forth."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from patcher_pl.models.lora import plain_name

Vector = list[Tensor]


class Weights:
    """Snapshots, shifts and restores the weights of a module, in place and to the last bit.

    The parameters are looked up once. What adapters hold is not part of them: an attacker gets the
    merged model, and a change of a merged weight is a change of the weight under the adapter.

    A forward pass and its backward pass must both lie inside, or both outside, a `shifted` block:
    the backward pass reads the weights again.

    Args:
        module: Model whose weights are owned. Its parameters must not be replaced afterwards.
    """

    def __init__(self, module: nn.Module) -> None:
        named = {
            plain: parameter
            for name, parameter in module.named_parameters()
            if (plain := plain_name(name)) is not None and parameter.is_floating_point()
        }
        self._module_parameters = list(module.parameters())
        self.names: list[str] = list(named)
        self.parameters: list[nn.Parameter] = list(named.values())
        self._buffer: Vector | None = None
        self._shifted = False

    @torch.no_grad()
    def snapshot(self) -> Vector:
        """Returns an independent copy of the weights."""
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def restore(self, saved: Sequence[Tensor]) -> None:
        """Puts saved weights back, bit for bit."""
        for parameter, value in zip(self.parameters, saved, strict=True):
            parameter.copy_(value)
        # Autocast keeps casts of weights until its context ends; these would be stale now.
        torch.clear_autocast_cache()

    @torch.no_grad()
    def difference(self, saved: Sequence[Tensor]) -> Vector:
        """Returns current weights minus `saved`: the attack vector where an attack lies between."""
        return [
            parameter.detach() - value
            for parameter, value in zip(self.parameters, saved, strict=True)
        ]

    def aligned(self, tensors: Sequence[Tensor], names: Sequence[str]) -> Vector:
        """Returns tensors that are named as in another model in the order of these weights."""
        by_name = dict(zip(names, tensors, strict=True))
        return [by_name[name] for name in self.names]

    @contextmanager
    def shifted(self, vector: Sequence[Tensor]) -> Iterator[None]:
        """Moves the weights by `vector` for the length of the block, then restores them exactly.

        Restores from saved tensors: adding and then subtracting would drift in low precision. The
        space for them is kept for the next time.

        Raises:
            RuntimeError: If the weights are shifted already.
        """
        if self._shifted:
            raise RuntimeError("Weights.shifted must not be entered twice; leave the first block.")
        saved = self._save_into_buffer()
        self._shifted = True
        try:
            with torch.no_grad():
                for parameter, change in zip(self.parameters, vector, strict=True):
                    parameter.add_(change)
            torch.clear_autocast_cache()
            yield
        finally:
            self.restore(saved)
            self._shifted = False

    @contextmanager
    def trainable(self) -> Iterator[list[nn.Parameter]]:
        """Makes exactly the owned weights trainable for the length of the block, then as before.

        Gradients that had been accumulated are set aside meanwhile and put back.
        """
        owned = {id(parameter) for parameter in self.parameters}
        before = [(p, p.requires_grad, p.grad) for p in self._module_parameters]
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in owned)
        try:
            yield self.parameters
        finally:
            for parameter, required, gradient in before:
                parameter.requires_grad_(required)
                parameter.grad = gradient

    @torch.no_grad()
    def _save_into_buffer(self) -> Vector:
        if self._buffer is None:
            self._buffer = [torch.empty_like(parameter) for parameter in self.parameters]
        for space, parameter in zip(self._buffer, self.parameters, strict=True):
            space.copy_(parameter)
        return self._buffer


def vector_norm(vector: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all tensors of a vector, as a scalar on their device."""
    return nn.utils.get_total_norm(list(vector))

"""Other tensors in the place of a module's parameters, for the length of a block."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def substituted(
    model: nn.Module, parameters: Sequence[Tensor], substitutes: Sequence[Tensor]
) -> Iterator[None]:
    """Puts `substitutes` where `parameters` are, tied ones included.

    What runs within the block sees them, and so does whatever is recomputed by a backward pass within
    it; a backward pass after it would recompute with the parameters, without any error.
    """
    by_identity = dict(zip(map(id, parameters), substitutes, strict=True))
    places = [
        (module, name, parameter)
        for module in model.modules()
        # By identity, not by name: a tied head is the embedding's own parameter, and must get its
        # substitute.
        for name, parameter in module._parameters.items()
        if id(parameter) in by_identity
    ]
    try:
        for module, name, parameter in places:
            module._parameters[name] = by_identity[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def is_checkpointing(model: nn.Module) -> bool:
    """Whether the model recomputes activations on its own, as Hugging Face stores it."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Switches the model's own recomputation of activations off, as Hugging Face stores it.

    It recomputes with the parameters that are in place later on, and knows nothing of forward
    derivatives.
    """
    modules = [module for module in model.modules() if getattr(module, "gradient_checkpointing", 0)]
    try:
        for module in modules:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True  # type: ignore[assignment]

"""Whether steps reach the weights at all, or are lost to rounding."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Steps after which is looked, weights that are looked at, and the share of those that must have moved.
CHECKED_STEPS = 8
LEAST_MOVED = 0.25
_SAMPLE = 1 << 14


class MovedShare:
    """Compares a sample of weights with what they were before the first step.

    Weights whose gradient has been zero all along are left out: nothing was to move them (embeddings
    of tokens that no batch had, adapters behind a matrix of zeros).

    Args:
        tensors: What an optimizer steps; whole, or this process's parts.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._stride = max(1, sum(tensor.numel() for tensor in self._tensors) // _SAMPLE)
        self._start = [self._sample(tensor).clone() for tensor in self._tensors]
        self._wanted = [torch.zeros_like(one, dtype=torch.bool) for one in self._start]

    @torch.no_grad()
    def note(self, gradients: Sequence[Tensor | None]) -> None:
        """Looks at the gradients of a step, before it is taken."""
        for wanted, gradient in zip(self._wanted, gradients, strict=True):
            if gradient is not None:
                wanted |= self._sample(gradient) != 0

    @torch.no_grad()
    def share(self, total: Callable[[Tensor], Tensor] | None = None) -> float | None:
        """Share of the weights with a gradient that differ by now (0..1); None without any.

        Args:
            total: Sums over the processes that hold the other parts; None where there are none.
        """
        moved, wanted = 0, 0
        for tensor, start, chosen in zip(self._tensors, self._start, self._wanted, strict=True):
            moved += int(((self._sample(tensor) != start) & chosen).sum())
            wanted += int(chosen.sum())
        if total is not None:
            moved, wanted = total(torch.tensor([moved, wanted])).tolist()
        return moved / wanted if wanted else None

    def _sample(self, tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(-1)[:: self._stride]


def is_lost(share: float | None) -> bool:
    """Whether too few weights moved for what was trained to mean anything."""
    return share is not None and share < LEAST_MOVED

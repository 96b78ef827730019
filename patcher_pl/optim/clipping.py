"""Clipping by the global norm, and its derivative."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patcher_pl.optim.base import Gradients, Vector
from patcher_pl.validation import require

# Sums a scalar over the processes where each holds a part of every vector.
Total = Callable[[Tensor], Tensor]

# Torch's: see `torch.nn.utils.clip_grad_norm_`.
_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class ClipByGlobalNorm:
    """Scales gradients down to a norm: g' = min(1, max_norm / (||g|| + 1e-6)) g.

    Args:
        max_norm: Largest norm over all parameters together (> 0).

    Raises:
        ValueError: If `max_norm` is not positive.

    References:
        Pascanu et al., 2013, https://arxiv.org/abs/1211.5063, with the constant of torch.
    """

    max_norm: float

    def __post_init__(self) -> None:
        remedy = "Leave clipping away to keep gradients as they are."
        require(self, self.max_norm > 0, "max_norm", "> 0", remedy)

    def applied(self, gradients: Gradients, total: Total | None = None) -> list[Tensor | None]:
        """Returns clipped copies; autograd can differentiate them, unless `total` is given.

        Args:
            gradients: One per parameter, or None.
            total: Given where other processes hold the rest of every gradient.
        """
        norm = self._norm(gradients, total)
        # Compared as torch does, where the scale is clamped to 1: the same steps are clipped, to
        # the last bit.
        if not bool(norm.detach() + _EPS > self.max_norm):
            return list(gradients)
        scale = self.max_norm / (norm + _EPS)
        return [None if gradient is None else gradient * scale for gradient in gradients]

    @torch.no_grad()
    def vjp(self, pulled: Vector, gradients: Gradients, total: Total | None = None) -> Vector:
        """Pulls the derivative by clipped gradients back to that by `gradients`.

        Where clipping is active, scale c: c (w - <w, g> g / (||g|| (||g|| + 1e-6))).

        Args:
            pulled: Derivatives by the clipped gradients; changed in place and returned.
            gradients: Gradients before clipping.
            total: Given where other processes hold the rest of every gradient.
        """
        norm = self._norm(gradients, total)
        if not bool(norm + _EPS > self.max_norm):
            return pulled
        scale = self.max_norm / (norm + _EPS)
        along = inner_product(pulled, gradients, total) / (norm * (norm + _EPS))
        for one, gradient in zip(pulled, gradients, strict=True):
            if gradient is not None:
                one.sub_(along * gradient)
            one.mul_(scale)
        return pulled

    def _norm(self, gradients: Gradients, total: Total | None) -> Tensor:
        present = [gradient for gradient in gradients if gradient is not None]
        if not present:
            return torch.zeros(())
        # As torch's get_total_norm, which cannot be differentiated.
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(gradient) for gradient in present])
        )
        return norm if total is None else total(norm.square()).sqrt()


def inner_product(
    first: Sequence[Tensor | None], second: Sequence[Tensor | None], total: Total | None = None
) -> Tensor:
    """<first, second> over all tensors together; None counts as zero.

    Args:
        first: A vector.
        second: A vector of the same shapes.
        total: Given where other processes hold the rest of both.
    """
    products = [
        torch.vdot(a.flatten(), b.flatten())
        for a, b in zip(first, second, strict=True)
        if a is not None and b is not None
    ]
    product = torch.stack(products).sum() if products else torch.zeros(())
    return product if total is None else total(product)

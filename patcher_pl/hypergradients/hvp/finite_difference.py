"""Hessian-vector products by differences of gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from patcher_pl.hypergradients.composites import ReplayableAttention
from patcher_pl.hypergradients.hvp.base import HessianProduct, Vector
from patcher_pl.models.shards import Shards
from patcher_pl.validation import require

Scheme = Literal["central", "one_sided"]


@dataclass(frozen=True, kw_only=True)
class FiniteDifference(HessianProduct):
    """H u from gradients at shifted weights; needs nothing but plain forward and backward passes.

        central:    (grad L(theta + e u) - grad L(theta - e u)) / 2 e      error O(e^2)
        one_sided:  (grad L(theta + e u) - grad L(theta)) / e              error O(e)

    with e so that ||e u|| = rel_step ||theta||. The one-sided scheme takes the gradient that the
    attack computed anyway. Memory: that of a gradient, and two vectors. Time: 2 gradients or 1.

    Args:
        scheme: Which of the two.
        rel_step: Length of the shift by that of the weights (> 0). None takes 3e-4 in float32 and
            1e-6 in float64, near the balance of truncation and round-off.
        mask_zero_gradients: Ignore entries of u where the gradient is exactly 0. These are mostly
            embedding rows that the batch does not show; AdamW makes their u large, which would use
            up the step. Entries at a stationary point are wrongly ignored too.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Pearlmutter, 1994, https://doi.org/10.1162/neco.1994.6.1.147, equation 2.
    """

    scheme: Scheme = "central"
    rel_step: float | None = None
    mask_zero_gradients: bool = True

    def __post_init__(self) -> None:
        remedy = "Use central unless time is short."
        require(self, self.scheme in get_args(Scheme), "scheme", "central or one_sided", remedy)
        remedy = "Use null for the default of the weights' type."
        require(self, self.rel_step is None or self.rel_step > 0, "rel_step", "> 0 or null", remedy)

    def gradient_evaluations(self, model: nn.Module) -> float:
        return 2.0 if self.scheme == "central" else 1.0

    @property
    def uses_gradients(self) -> bool:
        return self.mask_zero_gradients or self.scheme == "one_sided"

    @property
    def works_sharded(self) -> bool:
        return True

    def product(
        self,
        model: nn.Module,
        parameters: Sequence[Tensor],
        loss: Callable[[], Tensor],
        vector: Vector,
        gradients: Sequence[Tensor | None],
    ) -> Vector:
        if self.mask_zero_gradients:
            for u, gradient in zip(vector, gradients, strict=True):
                u.zero_() if gradient is None else u.masked_fill_(gradient == 0, 0.0)
        shards = Shards(model, parameters)
        # After masking: entries that no gradient depends on must not use up the step.
        length = float(shards.norm(vector))
        if length == 0.0:
            return [torch.zeros_like(tensor) for tensor in shards.tensors]
        scale = float(shards.norm(shards.tensors))
        step = self._rel_step(parameters[0].dtype) * scale / length
        # Copied back at the end: adding and subtracting e u would leave round-off behind.
        saved = [tensor.clone() for tensor in shards.tensors]
        try:
            above = _gradient_at(shards, saved, vector, step, loss)
            if self.scheme == "one_sided":
                return _difference(above, gradients, step, shards.tensors)
            below = _gradient_at(shards, saved, vector, -step, loss)
            return _difference(above, below, 2 * step, shards.tensors)
        finally:
            with shards.changing() as tensors:
                for tensor, value in zip(tensors, saved, strict=True):
                    tensor.copy_(value)

    def _rel_step(self, dtype: torch.dtype) -> float:
        if self.rel_step is not None:
            return self.rel_step
        return 1e-6 if dtype == torch.float64 else 3e-4


def _gradient_at(
    shards: Shards, saved: Vector, vector: Vector, step: float, loss: Callable[[], Tensor]
) -> Sequence[Tensor | None]:
    with shards.changing() as tensors:
        for tensor, value, u in zip(tensors, saved, vector, strict=True):
            torch.add(value, u, alpha=step, out=tensor)
    with ReplayableAttention():
        return shards.gradients(loss())


@torch.no_grad()
def _difference(
    above: Sequence[Tensor | None],
    below: Sequence[Tensor | None],
    step: float,
    tensors: Sequence[Tensor],
) -> Vector:
    return [
        torch.zeros_like(tensor) if high is None or low is None else (high - low).div_(step)
        for high, low, tensor in zip(above, below, tensors, strict=True)
    ]

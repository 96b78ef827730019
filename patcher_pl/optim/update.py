"""One attack step after its gradient: clipping, schedule and optimizer together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from patcher_pl.optim.base import (
    Cotangent,
    DifferentiableOptimizer,
    Gradients,
    OptimizerState,
    Vector,
)
from patcher_pl.optim.clipping import ClipByGlobalNorm, Total

Schedule = Literal["constant", "linear", "cosine"]


def lr_factor(schedule: Schedule, *, step: int, num_steps: int, num_warmup_steps: int = 0) -> float:
    """What the step size is multiplied by, as transformers' schedules of these names do.

    Args:
        schedule: Shape of the curve after warm-up.
        step: Steps taken before (count, >= 0).
        num_steps: Length of the curve, warm-up included (count).
        num_warmup_steps: Steps of linear warm-up from 0 (count).
    """
    if step < num_warmup_steps:
        return step / max(1, num_warmup_steps)
    if schedule == "constant":
        return 1.0
    length = max(1, num_steps - num_warmup_steps)
    if schedule == "linear":
        return max(0.0, (num_steps - step) / length)
    progress = (step - num_warmup_steps) / length
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


@dataclass(frozen=True, kw_only=True)
class Update:
    """Clips, then steps with the step size of the moment.

    Args:
        optimizer: The update itself.
        num_steps: Steps that the schedule spans (count).
        clip: Clipping before it; None for none.
        schedule: Learning-rate curve.
        num_warmup_steps: Steps of linear warm-up (count).
    """

    optimizer: DifferentiableOptimizer
    num_steps: int
    clip: ClipByGlobalNorm | None = None
    schedule: Schedule = "constant"
    num_warmup_steps: int = 0

    def lr(self, step: int) -> float:
        """Step size of the step before which `step` steps were taken."""
        return self.optimizer.lr * lr_factor(
            self.schedule,
            step=step,
            num_steps=self.num_steps,
            num_warmup_steps=self.num_warmup_steps,
        )

    def step_(
        self,
        parameters: Sequence[Tensor],
        gradients: Gradients,
        state: OptimizerState,
        step: int,
        total: Total | None = None,
    ) -> None:
        """Takes step number `step` (from 0) in place; leaves `gradients` as they are.

        Args:
            parameters: What is trained.
            gradients: One of the shape of each parameter, or None.
            state: From `DifferentiableOptimizer.init` or an earlier step; changed too.
            step: Number of the step.
            total: Given where other processes hold the rest of every vector; sums a scalar over them.
        """
        if self.clip is not None:
            clipped = self.clip.applied(gradients, total)
            gradients = [g if g is None else g.detach() for g in clipped]
        self.optimizer.step_(parameters, gradients, state, self.lr(step))

    def applied(
        self, parameters: Sequence[Tensor], gradients: Gradients, state: OptimizerState, step: int
    ) -> tuple[Vector, OptimizerState]:
        """Returns parameters and state after step number `step`, for autograd."""
        if self.clip is not None:
            gradients = self.clip.applied(gradients)
        return self.optimizer.applied(parameters, gradients, state, self.lr(step))

    def vjp(
        self,
        cotangent: Cotangent,
        gradients: Gradients,
        state: OptimizerState,
        step: int,
        total: Total | None = None,
    ) -> Vector:
        """Pulls `cotangent` back through step number `step`, in place; see `step_` and the optimizer's own.

        Returns:
            Derivatives by the gradients before clipping.
        """
        used = gradients if self.clip is None else self.clip.applied(gradients, total)
        pulled = self.optimizer.vjp(cotangent, used, state, self.lr(step))
        return pulled if self.clip is None else self.clip.vjp(pulled, gradients, total)

"""One attack step after its gradient: clipping, schedule and optimizer together."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from patcher_pl.optim.base import Cotangent, Gradients, Optimizer, OptimizerState, Vector
from patcher_pl.optim.clipping import ClipByGlobalNorm, Total
from patcher_pl.optim.schedules import Schedule, lr_factor


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

    optimizer: Optimizer
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
            state: From `Optimizer.init` or an earlier step; changed too.
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
        """Pulls `cotangent` back through step number `step`, in place; see `Optimizer.vjp`, `step_`.

        Returns:
            Derivatives by the gradients before clipping.
        """
        used = gradients if self.clip is None else self.clip.applied(gradients, total)
        pulled = self.optimizer.vjp(cotangent, used, state, self.lr(step))
        return pulled if self.clip is None else self.clip.vjp(pulled, gradients, total)

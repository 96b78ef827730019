"""Stochastic gradient descent."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patcher_pl.optim.base import DifferentiableOptimizer
from patcher_pl.validation import require


@dataclass(frozen=True, kw_only=True)
class SGD(DifferentiableOptimizer):
    """Gradient descent, optionally with heavy-ball momentum.

    Args:
        lr: Step size (> 0).
        momentum: Share of the previous update that is kept (in [0, 1)).
        weight_decay: L2 penalty added to the gradient (>= 0).

    Raises:
        ValueError: If a value is out of its range.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        require(self, self.lr > 0, "lr", "> 0", "Attacks commonly use 1e-3 to 1e-1.")
        require(self, 0 <= self.momentum < 1, "momentum", "in [0, 1)", "Use 0 for none.")
        require(self, self.weight_decay >= 0, "weight_decay", ">= 0", "Use 0 for no penalty.")

    @property
    def num_slots(self) -> int:
        return 1 if self.momentum else 0

    def build(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )

    def _step_one_(
        self, theta: Tensor, gradient: Tensor, slots: Sequence[Tensor], step: int, lr: float
    ) -> None:
        if self.weight_decay:
            gradient = gradient.add(theta, alpha=self.weight_decay)
        for velocity in slots:
            gradient = velocity.mul_(self.momentum).add_(gradient)
        theta.add_(gradient, alpha=-lr)

    def _applied_one(
        self, theta: Tensor, gradient: Tensor, slots: Sequence[Tensor], step: int, lr: float
    ) -> tuple[Tensor, Sequence[Tensor]]:
        direction = gradient + self.weight_decay * theta
        velocities = [self.momentum * velocity + direction for velocity in slots]
        for velocity in velocities:
            direction = velocity
        return theta - lr * direction, velocities

    def _vjp_one_(
        self,
        above: Tensor,
        moments: Sequence[Tensor],
        gradient: Tensor,
        slots: Sequence[Tensor],
        step: int,
        lr: float,
    ) -> Tensor:
        pulled = above * -lr
        for moment in moments:
            # Heavy ball: the velocity that the step left feeds the next step, too.
            pulled += moment
            moment.copy_(pulled).mul_(self.momentum)
        # The L2 term is part of the gradient, so theta acts through the velocity as well.
        above.add_(pulled, alpha=self.weight_decay)
        return pulled

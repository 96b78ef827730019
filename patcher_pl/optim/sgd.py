"""Stochastic gradient descent."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from patcher_pl.optim.base import Optimizer


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
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
        self._require(self.lr > 0, "lr", "> 0", "Attacks commonly use 1e-3 to 1e-1.")
        self._require(0 <= self.momentum < 1, "momentum", "in [0, 1)", "Use 0 for none.")
        self._require(self.weight_decay >= 0, "weight_decay", ">= 0", "Use 0 for no penalty.")

    def build(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )

"""AdamW."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from patcher_pl.optim.base import Optimizer


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay; defaults are torch's, which Patcher's scripts use too.

    Args:
        lr: Step size (> 0).
        betas: Decay rates of the first and second moment (each in [0, 1)).
        eps: Added to the root of the second moment (> 0).
        weight_decay: Decoupled decay per unit of lr (>= 0).

    Raises:
        ValueError: If a value is out of its range.

    References:
        Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        self._require(self.lr > 0, "lr", "> 0", "Attacks commonly use 1e-5 to 1e-3.")
        betas_hold = all(0 <= beta < 1 for beta in self.betas)
        self._require(betas_hold, "betas", "in [0, 1)", "Use 0 for no memory.")
        self._require(self.eps > 0, "eps", "> 0", "torch's default is 1e-8.")
        self._require(self.weight_decay >= 0, "weight_decay", ">= 0", "Use 0 for no decay.")

    def build(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameters, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )

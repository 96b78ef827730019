"""Adafactor."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from patcher_pl.optim.base import Optimizer
from patcher_pl.validation import require


@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Adam with a second moment of rows and columns only: little memory, for large attackers.

    Torch's own. Steps are relative: each tensor moves by `lr` (at most 1 / sqrt(step)) times its own
    root mean square. It has no closed-form derivative here, so an attack that is to be
    differentiated needs AdamW or SGD.

    Args:
        lr: Largest step, relative to the tensor (> 0); the paper's is 1e-2.
        beta2_decay: Exponent with which the second moment forgets less and less (<= 0).
        clip_threshold: Root mean square to which an update is clipped (>= 1).
        weight_decay: Decoupled decay per unit of lr (>= 0).

    Raises:
        ValueError: If a value is out of its range.

    References:
        Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235, algorithm 4, as changed by torch.
    """

    lr: float
    beta2_decay: float = -0.8
    clip_threshold: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        require(self, self.lr > 0, "lr", "> 0", "The paper's is 1e-2.")
        require(self, self.beta2_decay <= 0, "beta2_decay", "<= 0", "The paper's is -0.8.")
        require(self, self.clip_threshold >= 1, "clip_threshold", ">= 1", "The paper's is 1.")
        require(self, self.weight_decay >= 0, "weight_decay", ">= 0", "Use 0 for no decay.")

    def build(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(
            parameters,
            lr=self.lr,
            beta2_decay=self.beta2_decay,
            d=self.clip_threshold,
            weight_decay=self.weight_decay,
        )

"""Optimizers of the attackers, as frozen settings that can be printed, saved and swept."""

from patcher_pl.optim.adamw import AdamW
from patcher_pl.optim.base import Optimizer
from patcher_pl.optim.sgd import SGD

__all__ = ["SGD", "AdamW", "Optimizer"]

"""Optimizers of the attackers, as frozen settings that can be printed, saved and swept."""

from patcher_pl.optim.adafactor import Adafactor
from patcher_pl.optim.adamw import AdamW
from patcher_pl.optim.base import Cotangent, Optimizer, OptimizerState
from patcher_pl.optim.clipping import ClipByGlobalNorm
from patcher_pl.optim.schedules import Schedule, lr_factor
from patcher_pl.optim.sgd import SGD
from patcher_pl.optim.update import Update

__all__ = [
    "SGD",
    "Adafactor",
    "AdamW",
    "ClipByGlobalNorm",
    "Cotangent",
    "Optimizer",
    "OptimizerState",
    "Schedule",
    "Update",
    "lr_factor",
]

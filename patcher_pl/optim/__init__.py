"""Optimizers of the attackers, as frozen settings that can be printed, saved and swept."""

from patcher_pl.optim.adafactor import Adafactor
from patcher_pl.optim.adamw import AdamW
from patcher_pl.optim.base import Cotangent, DifferentiableOptimizer, Optimizer, OptimizerState
from patcher_pl.optim.clipping import ClipByGlobalNorm
from patcher_pl.optim.sgd import SGD
from patcher_pl.optim.update import Schedule, Update, lr_factor

__all__ = [
    "SGD",
    "Adafactor",
    "AdamW",
    "ClipByGlobalNorm",
    "Cotangent",
    "DifferentiableOptimizer",
    "Optimizer",
    "OptimizerState",
    "Schedule",
    "Update",
    "lr_factor",
]

"""Pure loss functions."""

from patcher_pl.losses.causal_lm import answer_cross_entropy, causal_lm_loss, differentiable_loss
from patcher_pl.losses.lean_cross_entropy import lean_cross_entropy
from patcher_pl.losses.mmd import maximum_mean_discrepancy

__all__ = [
    "answer_cross_entropy",
    "causal_lm_loss",
    "differentiable_loss",
    "lean_cross_entropy",
    "maximum_mean_discrepancy",
]

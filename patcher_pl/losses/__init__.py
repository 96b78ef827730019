"""Pure loss functions."""

from patcher_pl.losses.causal_lm import answer_cross_entropy, causal_lm_loss
from patcher_pl.losses.mmd import maximum_mean_discrepancy

__all__ = ["answer_cross_entropy", "causal_lm_loss", "maximum_mean_discrepancy"]

"""Pure loss functions."""

from patcher_pl.losses.causal_lm import answer_cross_entropy, causal_lm_loss

__all__ = ["answer_cross_entropy", "causal_lm_loss"]

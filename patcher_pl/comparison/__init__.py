"""Defenses against each other: the same budget, the same search of settings, the same attacks."""

from patcher_pl.comparison.contender import Contender
from patcher_pl.comparison.selection import Selection, trial_of

__all__ = ["Contender", "Selection", "trial_of"]

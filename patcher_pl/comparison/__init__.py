"""Defenses against each other: the same budget, the same search of settings, the same attacks."""

from patcher_pl.comparison.column import Column, require_fresh_seeds
from patcher_pl.comparison.contender import Contender
from patcher_pl.comparison.selection import Selection, trial_of

__all__ = ["Column", "Contender", "Selection", "require_fresh_seeds", "trial_of"]

"""Comparing hypergradient estimators with the exact hypergradient, on one trained model."""

from patcher_pl.ablation.grid import ComparisonGrid
from patcher_pl.ablation.hardening import Hardening
from patcher_pl.ablation.runner import compare_estimators
from patcher_pl.ablation.subject import Subject

__all__ = ["ComparisonGrid", "Hardening", "Subject", "compare_estimators"]

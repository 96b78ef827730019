"""Defenses: one LightningModule per method."""

from patcher_pl.defenses.base import Defense
from patcher_pl.defenses.patcher import Patcher
from patcher_pl.defenses.sft import SFT

__all__ = ["SFT", "Defense", "Patcher"]

"""Defenses: one LightningModule per method."""

from patcher_pl.defenses.base import Defense
from patcher_pl.defenses.booster import Booster
from patcher_pl.defenses.patcher import Patcher
from patcher_pl.defenses.seam import Seam
from patcher_pl.defenses.sft import SFT
from patcher_pl.defenses.tar import Tar

__all__ = ["SFT", "Booster", "Defense", "Patcher", "Seam", "Tar"]

"""Defenses: one LightningModule per method."""

from patcher_pl.defenses.base import Defense
from patcher_pl.defenses.booster import Booster
from patcher_pl.defenses.ctrap import Ctrap
from patcher_pl.defenses.patcher import Patcher
from patcher_pl.defenses.repnoise import RepNoise
from patcher_pl.defenses.seam import Seam
from patcher_pl.defenses.sft import SFT
from patcher_pl.defenses.t_vaccine import TVaccine
from patcher_pl.defenses.tar import Tar
from patcher_pl.defenses.vaccine import Vaccine

__all__ = [
    "SFT",
    "Booster",
    "Ctrap",
    "Defense",
    "Patcher",
    "RepNoise",
    "Seam",
    "TVaccine",
    "Tar",
    "Vaccine",
]

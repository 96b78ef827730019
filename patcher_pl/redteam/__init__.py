"""Test-time attacks on released weights, and the grid that measures a defense against them."""

from patcher_pl.redteam.asking import Asking
from patcher_pl.redteam.base import Attack, AttackPoint
from patcher_pl.redteam.full_finetuning import FullFinetuning
from patcher_pl.redteam.grid import Cell, Grid
from patcher_pl.redteam.lora_finetuning import LoraFinetuning
from patcher_pl.redteam.material import AttackMaterial
from patcher_pl.redteam.red_team import RedTeam
from patcher_pl.redteam.search import Search
from patcher_pl.redteam.target import Target

__all__ = [
    "Asking",
    "Attack",
    "AttackMaterial",
    "AttackPoint",
    "Cell",
    "FullFinetuning",
    "Grid",
    "LoraFinetuning",
    "RedTeam",
    "Search",
    "Target",
]

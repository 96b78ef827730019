"""Test-time attacks on released weights, and the grid that measures a defense against them."""

from patcher_pl.redteam.base import Attack, AttackPoint, BatchFactory
from patcher_pl.redteam.full_finetuning import FullFinetuning
from patcher_pl.redteam.lora_finetuning import LoraFinetuning
from patcher_pl.redteam.red_team import RedTeam

__all__ = [
    "Attack",
    "AttackPoint",
    "BatchFactory",
    "FullFinetuning",
    "LoraFinetuning",
    "RedTeam",
]

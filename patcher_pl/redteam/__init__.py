"""Test-time attacks on released weights, and the grid that measures a defense against them."""

from patcher_pl.redteam.abliteration import Abliteration
from patcher_pl.redteam.asking import Asking
from patcher_pl.redteam.base import Attack, AttackPoint
from patcher_pl.redteam.benign_then_harmful import BenignThenHarmful
from patcher_pl.redteam.delta_strip import DeltaStrip
from patcher_pl.redteam.finetuning import FinetuningAttack
from patcher_pl.redteam.full_finetuning import BenignFinetuning, FullFinetuning
from patcher_pl.redteam.grid import Cell, Grid
from patcher_pl.redteam.jailbreak import Jailbreak
from patcher_pl.redteam.material import AttackMaterial
from patcher_pl.redteam.multi_turn_finetuning import MultiTurnFinetuning
from patcher_pl.redteam.partial_finetuning import EmbeddingFinetuning, LoraFinetuning
from patcher_pl.redteam.red_team import RedTeam
from patcher_pl.redteam.restarted_finetuning import RestartedFinetuning
from patcher_pl.redteam.search import Search
from patcher_pl.redteam.soft_prompt import SoftPrompt
from patcher_pl.redteam.target import Target
from patcher_pl.redteam.vector_outrunning import VectorOutrunning

__all__ = [
    "Abliteration",
    "Asking",
    "Attack",
    "AttackMaterial",
    "AttackPoint",
    "BenignFinetuning",
    "BenignThenHarmful",
    "Cell",
    "DeltaStrip",
    "EmbeddingFinetuning",
    "FinetuningAttack",
    "FullFinetuning",
    "Grid",
    "Jailbreak",
    "LoraFinetuning",
    "MultiTurnFinetuning",
    "RedTeam",
    "RestartedFinetuning",
    "Search",
    "SoftPrompt",
    "Target",
    "VectorOutrunning",
]

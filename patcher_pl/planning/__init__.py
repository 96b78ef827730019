"""What a run will need, before anything is bought: memory by part, FLOPs, time, and what fits."""

from patcher_pl.planning.footprint import Footprint, LayerSizes
from patcher_pl.planning.hardware import GPUS, Gpu, find_gpu
from patcher_pl.planning.parts import ATTACK, DEFEND, HYPERGRADIENT, Part
from patcher_pl.planning.placements import Need, Overhead, Placement
from patcher_pl.planning.plan import Plan
from patcher_pl.planning.tracker import Tracker
from patcher_pl.planning.workload import Rounds, Workload

__all__ = [
    "ATTACK",
    "DEFEND",
    "GPUS",
    "HYPERGRADIENT",
    "Footprint",
    "Gpu",
    "LayerSizes",
    "Need",
    "Overhead",
    "Part",
    "Placement",
    "Plan",
    "Rounds",
    "Tracker",
    "Workload",
    "find_gpu",
]

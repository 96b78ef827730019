"""What a run will need, before anything is bought: memory by part, FLOPs, time, and what fits."""

from patcher_pl.planning.hardware import GPUS, Gpu
from patcher_pl.planning.plan import Plan, PlanSettings, Run, Sizes, make_plan, size_up

__all__ = ["GPUS", "Gpu", "Plan", "PlanSettings", "Run", "Sizes", "make_plan", "size_up"]

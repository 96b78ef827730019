"""What a run will need, before anything is bought: memory by part, FLOPs, time, and what fits."""

from patcher_pl.planning.hardware import GPUS, Gpu
from patcher_pl.planning.plan import Plan, PlanSettings, Run, make_plan

__all__ = ["GPUS", "Gpu", "Plan", "PlanSettings", "Run", "make_plan"]

"""What runs the cells of a red team: this process, processes of this machine, or a Ray cluster."""

from patcher_pl.redteam.engines.base import Engine
from patcher_pl.redteam.engines.in_process import InProcess
from patcher_pl.redteam.engines.processes import Processes
from patcher_pl.redteam.engines.ray_cluster import RayCluster

__all__ = ["Engine", "InProcess", "Processes", "RayCluster"]

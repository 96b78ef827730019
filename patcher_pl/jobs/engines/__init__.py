"""What runs jobs: this process, processes of this machine, or a Ray cluster."""

from patcher_pl.jobs.engines.base import Engine, run_missing
from patcher_pl.jobs.engines.in_process import InProcess
from patcher_pl.jobs.engines.processes import Processes
from patcher_pl.jobs.engines.ray_cluster import RayCluster

__all__ = ["Engine", "InProcess", "Processes", "RayCluster", "run_missing"]

"""The engines of `patcher_pl.jobs`, under the name that configurations give them."""

from patcher_pl.jobs import Engine, InProcess, Processes, RayCluster, SlurmArray

__all__ = ["Engine", "InProcess", "Processes", "RayCluster", "SlurmArray"]

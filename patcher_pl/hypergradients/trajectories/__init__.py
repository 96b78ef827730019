"""Trajectory stores: memory against recomputation on the way back."""

from patcher_pl.hypergradients.trajectories.base import TrajectoryStore
from patcher_pl.hypergradients.trajectories.revolve import Revolve
from patcher_pl.hypergradients.trajectories.segmented import FullState, GradientLog, SqrtCheckpoint

__all__ = ["FullState", "GradientLog", "Revolve", "SqrtCheckpoint", "TrajectoryStore"]

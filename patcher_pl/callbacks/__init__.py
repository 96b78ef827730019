"""Callbacks: checkpoints, signals, cost, and how robust the model is while it trains."""

from patcher_pl.callbacks.checkpoint_files import AtomicCheckpointIO
from patcher_pl.callbacks.compute_budget import ComputeBudget
from patcher_pl.callbacks.concurrency_monitor import ConcurrencyMonitor
from patcher_pl.callbacks.cost_monitor import CostMonitor
from patcher_pl.callbacks.graceful_stop import GracefulStop
from patcher_pl.callbacks.progress import Progress, ProgressLog
from patcher_pl.callbacks.robustness_probe import RobustnessProbe
from patcher_pl.callbacks.run_checkpoint import RunCheckpoint
from patcher_pl.callbacks.run_record import RunRecord

__all__ = [
    "AtomicCheckpointIO",
    "ComputeBudget",
    "ConcurrencyMonitor",
    "CostMonitor",
    "GracefulStop",
    "Progress",
    "ProgressLog",
    "RobustnessProbe",
    "RunCheckpoint",
    "RunRecord",
]

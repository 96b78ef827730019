"""Assignments as tasks of a Ray cluster."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.progress import progress_bar
from patcher_pl.redteam.assignment import Assignment
from patcher_pl.redteam.engines.base import Engine


@dataclass(frozen=True, kw_only=True)
class RayCluster(Engine):
    """Spreads assignments over a Ray cluster, or over a Ray of this machine.

    Needs the extra `ray`. `run_dir`, models and data must be at the same paths on all nodes, on a
    shared file system, with this package installed everywhere. A task whose node dies is tried
    again by Ray.

    Args:
        address: Of the cluster, such as `auto`; None starts Ray on this machine.
        num_cpus: CPUs of a task (count, > 0).
        num_gpus: GPUs of a task; a fraction shares one.
        max_retries: How often a task whose worker died is tried again (count, >= 0).

    Raises:
        ValueError: If a value is out of its range.

    References:
        https://docs.ray.io
    """

    address: str | None = None
    num_cpus: float = 1
    num_gpus: float = 0
    max_retries: int = 1

    def __post_init__(self) -> None:
        if not self.num_cpus > 0:
            raise ValueError(f"RayCluster.num_cpus must be > 0, got {self.num_cpus}.")
        if not self.num_gpus >= 0:
            raise ValueError(f"RayCluster.num_gpus must be >= 0, got {self.num_gpus}.")
        if self.max_retries < 0:
            raise ValueError(f"RayCluster.max_retries must be >= 0, got {self.max_retries}.")

    def run(self, assignments: Sequence[Assignment], device: str) -> None:
        ray = _imported()
        started_here = not ray.is_initialized()
        if started_here:
            # Ray's usage statistics would go to its makers.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(
                address=self.address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        try:
            self._run(ray, assignments, "cuda" if self.num_gpus else device)
        finally:
            if started_here:
                ray.shutdown()

    def _run(self, ray: Any, assignments: Sequence[Assignment], device: str) -> None:
        task = ray.remote(
            num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_retries=self.max_retries
        )(_perform)
        pending = {
            task.remote(_on_shared_files(assignment), device): assignment
            for assignment in assignments
        }
        with progress_bar("attacks", len(assignments)) as advance:
            while pending:
                (done,), _ = ray.wait(list(pending))
                assignment = pending.pop(done)
                try:
                    ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    cause = error.cause
                    if isinstance(cause, PatcherError):
                        raise cause from None
                    assignment.fail(_in_a_line(cause))
                except ray.exceptions.RayError as error:
                    assignment.fail(_in_a_line(error))
                advance()


def _perform(assignment: Assignment, device: str) -> None:
    assignment.perform(device)


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _on_shared_files(assignment: Assignment) -> Assignment:
    """The same with absolute paths: a worker has a working directory of its own."""
    return replace(assignment, path=assignment.path.absolute())


def _imported() -> Any:
    try:
        import ray  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            "RayCluster needs Ray. Install it with `pip install 'patcher-pl[ray]'`, or use "
            "patcher_pl.redteam.engines.Processes."
        ) from error
    return ray

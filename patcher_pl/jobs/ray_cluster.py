"""Jobs as tasks of a Ray cluster."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.jobs.engine import Engine
from patcher_pl.jobs.job import Job
from patcher_pl.jobs.signals import stoppable
from patcher_pl.progress import progress_bar
from patcher_pl.validation import require


@dataclass(frozen=True, kw_only=True)
class RayCluster(Engine):
    """Spreads jobs over a Ray cluster, or over a Ray of this machine.

    Needs the extra `ray`. `run_dir`, models, data and configurations must be at the same paths on
    all nodes, on a shared file system, with this package installed everywhere. A task whose node
    dies is tried again by Ray.

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
        require(self, self.num_cpus > 0, "num_cpus", "> 0")
        require(self, self.num_gpus >= 0, "num_gpus", ">= 0")
        require(self, self.max_retries >= 0, "max_retries", ">= 0")

    def run(self, jobs: Sequence[Job], device: str, label: str) -> None:
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
            with stoppable(label):
                self._run(ray, jobs, "cuda" if self.num_gpus else device, label)
        finally:
            if started_here:
                ray.shutdown()

    def num_threads(self, num_jobs: int) -> int:
        return max(1, int(self.num_cpus))

    def at_once(self, num_jobs: int) -> None:
        return None  # The cluster decides, and may grow.

    def _run(self, ray: Any, jobs: Sequence[Job], device: str, label: str) -> None:
        options = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        if any(job.wants_own_process for job in jobs):
            options["max_calls"] = 1
        task = ray.remote(max_retries=self.max_retries, **options)(_attempt)
        folder = str(Path.cwd())
        pending = {task.remote(job, device, folder): job for job in jobs}
        try:
            with progress_bar(label, len(jobs)) as advance:
                while pending:
                    (done,), _ = ray.wait(list(pending))
                    self._collect(ray, done, pending.pop(done))
                    advance()
        finally:
            for task in pending:
                ray.cancel(task)  # The cluster would go on with them.
            if pending:
                ray.wait(list(pending), num_returns=len(pending))  # They may save checkpoints.

    def _collect(self, ray: Any, task: Any, job: Job) -> None:
        try:
            ray.get(task)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, PatcherError):
                raise cause from None
            job.fail(_in_a_line(cause))
        except ray.exceptions.RayError as error:
            job.fail(_in_a_line(error))


def _attempt(job: Job, device: str, folder: str) -> None:
    os.chdir(folder)  # A worker has a working directory of its own, and paths may be relative.
    job.attempt(device)


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _imported() -> Any:
    try:
        import ray  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            "RayCluster needs Ray. Install it with `pip install 'patcher-pl[ray]'`, or use "
            "patcher_pl.redteam.engines.Processes."
        ) from error
    return ray

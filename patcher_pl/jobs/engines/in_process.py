"""One job after the other, in this process."""

from collections.abc import Sequence
from dataclasses import dataclass

from patcher_pl.errors import ConfigError
from patcher_pl.jobs.engines.base import Engine
from patcher_pl.jobs.job import Job
from patcher_pl.jobs.signals import stoppable
from patcher_pl.progress import progress_bar
from patcher_pl.reports.environment import usable_cpus


@dataclass(frozen=True, kw_only=True)
class InProcess(Engine):
    """Runs in this process; a model is loaded once for all attacks on it."""

    def run(self, jobs: Sequence[Job], device: str, label: str) -> None:
        if any(job.wants_own_process for job in jobs):
            raise ConfigError(
                f"engine: {label} measure the memory of a process of their own, got InProcess. "
                "Use Processes or RayCluster."
            )
        with stoppable(label), progress_bar(label, len(jobs)) as advance:
            for job in jobs:
                job.attempt(device)
                advance()

    def num_threads(self, num_jobs: int) -> int:
        return usable_cpus()

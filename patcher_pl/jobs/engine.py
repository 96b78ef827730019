"""What runs jobs: the interface, the engine that is this process, and how every command uses one."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from patcher_pl.errors import ConfigError
from patcher_pl.jobs.job import Job
from patcher_pl.jobs.signals import stoppable
from patcher_pl.progress import progress_bar
from patcher_pl.reports.environment import usable_cpus

AnyJob = TypeVar("AnyJob", bound=Job)


class Engine(ABC):
    """Runs jobs, with a progress bar that shows the remaining time."""

    @abstractmethod
    def run(self, jobs: Sequence[Job], device: str, label: str) -> None:
        """Runs every job once; each leaves its file.

        One that fails, or whose process dies, leaves a file with its error, and the others go on.
        No job outlives this process, however it ends.

        Args:
            jobs: What is not done yet.
            device: Where to run, unless the engine has devices of its own.
            label: What the jobs are called.

        Raises:
            PatcherError: If a job met what all others would meet too, or the engine cannot be used.
            RunInterrupted: If a signal stopped it; finished jobs are kept.
        """

    @abstractmethod
    def num_threads(self, num_jobs: int) -> int:
        """CPU threads for each of so many jobs (count, >= 1)."""

    @abstractmethod
    def at_once(self, num_jobs: int) -> int | None:
        """How many of so many jobs run at the same time; None where that is not known."""

    @property
    def processes_per_job(self) -> int:
        """Processes that do a job together (count, >= 1), see `Job.perform_together`."""
        return 1


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

    def at_once(self, num_jobs: int) -> int:
        return 1


def require_one_process(engine: Engine, label: str) -> None:
    """Refuses an engine that has several processes do a job, for jobs that cannot be shared.

    Raises:
        ConfigError: If it is one.
    """
    if engine.processes_per_job > 1:
        raise ConfigError(
            f"engine.init_args.tasks_per_node must be 1 for {label}, got {engine.processes_per_job}. "
            "Each of them is the work of one process on one device; leave it away."
        )


def run_missing(jobs: Sequence[AnyJob], engine: Engine, device: str, label: str) -> list[AnyJob]:
    """Runs what is not done yet, as `Engine.run` does, and returns what failed."""
    todo = [job for job in jobs if not job.is_done]
    print(f"{len(jobs)} {label}, {len(jobs) - len(todo)} done already.")
    if todo:
        engine.run(todo, device, label)
    return [job for job in todo if not job.is_done]

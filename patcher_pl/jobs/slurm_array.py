"""Jobs as a SLURM job array, through submitit."""

import os
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.jobs.engine import Engine
from patcher_pl.jobs.job import Job
from patcher_pl.jobs.signals import stoppable
from patcher_pl.progress import progress_bar
from patcher_pl.validation import require

_POLL_S = 2.0
_LOOK_EVERY_S, _GRACE_S = 20.0, 60.0
# SLURM limits how many tasks an array has (`MaxArraySize`, 1001 unless set).
_MAX_ARRAY = 1000


@dataclass(frozen=True, kw_only=True)
class SlurmArray(Engine):
    """Submits jobs to SLURM as arrays, a task each, and waits for them.

    Needs the extra `slurm`. `run_dir`, models, data and configurations must be at the same paths on
    all nodes, on a shared file system, with this environment. A task whose time runs out, or that is
    preempted, is put back into the queue, and goes on from what it had written. Where the command
    itself is killed, tasks that have been submitted run to their end; the same command then takes
    what they found.

    Args:
        timeout_min: Time limit of a task in minutes (>= 1).
        num_at_once: Tasks that may run at the same time (count, >= 1).
        num_cpus: CPUs of a task (count, >= 1).
        num_gpus: GPUs of a task (count, >= 0).
        max_timeouts: How often a task whose time ran out is put back (count, >= 0).
        logs: Folder for what submitit writes: scripts, outputs and errors of every task.
        options: Further ones of sbatch, such as {partition: a100, account: safety}.

    Raises:
        ValueError: If a value is out of its range.

    References:
        https://github.com/facebookincubator/submitit
    """

    timeout_min: int = 240
    num_at_once: int = 64
    num_cpus: int = 4
    num_gpus: int = 0
    max_timeouts: int = 3
    logs: str = "slurm-logs"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self, self.timeout_min >= 1, "timeout_min", ">= 1")
        require(self, self.num_at_once >= 1, "num_at_once", ">= 1")
        require(self, self.num_cpus >= 1, "num_cpus", ">= 1")
        require(self, self.num_gpus >= 0, "num_gpus", ">= 0")
        require(self, self.max_timeouts >= 0, "max_timeouts", ">= 0")

    def run(self, jobs: Sequence[Job], device: str, label: str) -> None:
        executor = self._executor(label)
        device = "cuda" if self.num_gpus else device
        waiting, running, queue = deque(jobs), list[tuple[Any, Job]](), _Queue()
        with stoppable(label), progress_bar(label, len(jobs)) as advance:
            try:
                while waiting or running:
                    if waiting and not running:
                        part = [waiting.popleft() for _ in range(min(len(waiting), _MAX_ARRAY))]
                        attempts = [_Attempt(job, device, str(Path.cwd())) for job in part]
                        running = list(zip(executor.submit_array(attempts), part, strict=True))
                    queue.look()
                    done = [pair for pair in running if pair[0].done() or queue.lost(pair[0])]
                    running = [pair for pair in running if pair not in done]
                    for task, job in done:
                        _collect(task, job)
                        advance()
                    if running:
                        time.sleep(_POLL_S)
            finally:
                for task, _ in running:
                    task.cancel(check=False)

    def num_threads(self, num_jobs: int) -> int:
        return self.num_cpus

    def at_once(self, num_jobs: int) -> int:
        return min(num_jobs, self.num_at_once)

    def _executor(self, label: str) -> Any:
        submitit = _imported()
        if submitit.SlurmExecutor.affinity() < 0:
            raise ConfigError(
                "engine: SlurmArray found no SLURM (`sbatch`, `srun`) on this machine. Run the command "
                "on a machine that submits jobs, or use Processes."
            )
        executor = submitit.SlurmExecutor(
            folder=Path(self.logs).absolute(), max_num_timeout=self.max_timeouts
        )
        resources: dict[str, Any] = {"cpus_per_task": self.num_cpus, "ntasks_per_node": 1}
        if self.num_gpus:
            resources["gpus_per_node"] = self.num_gpus
        executor.update_parameters(
            job_name=f"patcher_pl-{label}".replace(" ", "-"),
            time=self.timeout_min,
            array_parallelism=self.num_at_once,
            **resources,
            **({"additional_parameters": self.options} if self.options else {}),
        )
        return executor


@dataclass(frozen=True)
class _Attempt:
    """`Job.attempt` on a node, with what submitit asks for when the time is up."""

    job: Job
    device: str
    folder: str

    def __call__(self) -> str | None:
        """Returns what all other jobs would meet too: submitit keeps no exceptions, but their text."""
        os.chdir(self.folder)
        try:
            self.job.attempt(self.device)
        except PatcherError as error:
            return str(error)
        return None

    def checkpoint(self) -> Any:
        """The same once more: what was measured so far is in the job's own files."""
        return _imported().helpers.DelayedSubmission(self)


class _Queue:
    """Tells which tasks have left SLURM's queue; submitit asks accounting, which not all have."""

    def __init__(self) -> None:
        self._looked_at = -_LOOK_EVERY_S
        self._absent_s: dict[str, float] = {}
        self._queued: set[str] | None = None

    def look(self) -> None:
        """Asks, now and then."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_EVERY_S:
            return
        self._looked_at = now
        command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]  # None that ended.
        said = subprocess.run(command, capture_output=True, text=True)
        # A controller that does not answer says nothing about the tasks.
        self._queued = set(said.stdout.split()) if said.returncode == 0 else None

    def lost(self, task: Any) -> bool:
        """Whether a task is gone for a while: its result may be seen late on a shared file system."""
        if self._queued is None or task.job_id in self._queued:
            self._absent_s.pop(task.job_id, None)
            return False
        since = self._absent_s.setdefault(task.job_id, time.monotonic())
        return time.monotonic() - since > _GRACE_S


def _collect(task: Any, job: Job) -> None:
    if not task.done():
        job.fail(f"SLURM task {task.job_id} ended without a word; see {task.paths.stderr}")
    elif task.exception() is not None:
        # Its last words are in a log of several pages.
        job.fail(f"SLURM task {task.job_id} ended in state {task.state}; see {task.paths.stderr}")
    elif (shared := task.result()) is not None:
        raise PatcherError(shared)


def _imported() -> Any:
    try:
        import submitit  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            "SlurmArray needs submitit. Install it with `pip install 'patcher-pl[slurm]'`, or use "
            "patcher_pl.redteam.engines.Processes."
        ) from error
    return submitit

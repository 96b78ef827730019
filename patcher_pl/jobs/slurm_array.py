"""Jobs as a SLURM job array, through submitit."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patcher_pl import launcher
from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.jobs.engine import Engine, require_one_process
from patcher_pl.jobs.job import Job
from patcher_pl.jobs.signals import interrupt, stoppable
from patcher_pl.progress import progress_bar
from patcher_pl.validation import require

_POLL_S = 2.0
_LOOK_EVERY_S, _GRACE_S = 20.0, 60.0
# SLURM limits how many tasks an array has (`MaxArraySize`, 1001 unless set).
_MAX_ARRAY = 1000


@dataclass(frozen=True, kw_only=True)
class SlurmArray(Engine):
    """Submits jobs to SLURM as tasks of arrays, and waits for them.

    Needs the extra `slurm`. `run_dir`, models, data and configurations must be at the same paths on
    all nodes, on a shared file system, with this environment. At most `num_at_once` tasks are
    submitted; as some end, an array of the next ones takes their places. A task whose time runs out,
    or that is preempted, is put back into the queue, and goes on from what it had written. Where the
    command itself is killed, tasks that have been submitted run to their end; the same command then
    takes what they found.

    With `tasks_per_node` above 1, srun starts that many processes for every job, on one node, which
    do it together: runs of `fit` whose configuration has as many `trainer.devices` and a strategy
    that shards, and attacks of `redteam` on a model that they hold together. Where one of them
    fails, SLURM ends the others.

    Args:
        timeout_min: Time limit of a task in minutes (>= 1).
        num_at_once: Tasks that are submitted at the same time, whether they run or wait (count, >= 1).
        tasks_per_node: Processes of a job, SLURM's `--ntasks-per-node` (count, >= 1).
        num_cpus: CPUs of each process (count, >= 1).
        num_gpus: GPUs of each process (count, >= 0).
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
    tasks_per_node: int = 1
    num_cpus: int = 4
    num_gpus: int = 0
    max_timeouts: int = 3
    logs: str = "slurm-logs"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self, self.timeout_min >= 1, "timeout_min", ">= 1")
        require(self, self.num_at_once >= 1, "num_at_once", ">= 1")
        require(self, self.tasks_per_node >= 1, "tasks_per_node", ">= 1")
        require(self, self.num_cpus >= 1, "num_cpus", ">= 1")
        require(self, self.num_gpus >= 0, "num_gpus", ">= 0")
        require(self, self.max_timeouts >= 0, "max_timeouts", ">= 0")

    def run(self, jobs: Sequence[Job], device: str, label: str) -> None:
        if not all(job.is_shareable for job in jobs):
            require_one_process(self, label)
        executor = self._executor(label)
        device = "cuda" if self.num_gpus else device
        waiting, running, queue = deque(jobs), list[_Task](), _Queue()
        with stoppable(label), progress_bar(label, len(jobs)) as advance:
            try:
                while waiting or running:
                    if places := min(self.num_at_once - len(running), len(waiting), _MAX_ARRAY):
                        part = [waiting.popleft() for _ in range(places)]
                        running += self._submitted(executor, part, device)
                    queue.look()
                    done = [task for task in running if task.has_ended or queue.lost(task.id)]
                    running = [task for task in running if task not in done]
                    for task in done:
                        task.collect()
                        advance()
                    if running and not done:
                        time.sleep(_POLL_S)
            finally:
                _cancel(running, queue)

    def num_threads(self, num_jobs: int) -> int:
        return self.num_cpus

    def at_once(self, num_jobs: int) -> int:
        return min(num_jobs, self.num_at_once)

    @property
    def processes_per_job(self) -> int:
        return self.tasks_per_node

    def _submitted(self, executor: Any, jobs: Sequence[Job], device: str) -> "list[_Task]":
        is_shared, folder = self.tasks_per_node > 1, str(Path.cwd())
        attempts = [_Attempt(job, device, folder, is_shared) for job in jobs]
        try:
            tasks = executor.submit_array(attempts)
        except _imported().core.utils.FailedJobError as error:
            said = str(error).strip().splitlines()[-1]
            raise ConfigError(
                f"engine: SLURM takes no more tasks: {said}. Change SlurmArray's settings or options "
                "(fewer tasks are submitted at a time with a lower num_at_once), and go on with the "
                "same command."
            ) from error
        return [_Task(task, job) for task, job in zip(tasks, jobs, strict=True)]

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
        resources: dict[str, Any] = {
            "cpus_per_task": self.num_cpus,
            "ntasks_per_node": self.tasks_per_node,
        }
        if self.num_gpus:
            # Not per task: each process has to see its neighbours' GPUs, as Lightning counts them.
            resources["gpus_per_node"] = self.num_gpus * self.tasks_per_node
        # Since SLURM 22.05, srun does not take over how many CPUs a process has.
        resources["srun_args"] = [f"--cpus-per-task={self.num_cpus}"]
        if self.tasks_per_node > 1:
            resources["srun_args"].append("--kill-on-bad-exit=1")
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
    is_shared: bool

    def __call__(self) -> str | None:
        """Returns what all other jobs would meet too: submitit keeps no exceptions, but their text."""
        os.chdir(self.folder)
        requeue, received = signal.getsignal(signal.SIGUSR2), list[int]()
        signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
        if launcher.rank() == 0:  # The others go on, and end with it.
            signal.signal(signal.SIGUSR2, lambda *_: interrupt())
        try:
            self._perform()
        except PatcherError as error:
            return str(error)
        except KeyboardInterrupt:
            # What the job began has ended, with a checkpoint; SLURM would not wait for that.
            assert callable(requeue)
            try:
                requeue(signal.SIGUSR2, None)
            except Exception as error:
                self.job.fail(f"{error} See SlurmArray.max_timeouts and timeout_min.")
        if received and not self.job.is_done:
            # SLURM ends this task, and may run it again: a result would say that it is over.
            threading.Event().wait()
        return None

    def _perform(self) -> None:
        if self.is_shared:
            self.job.perform_together(self.device)
        else:
            self.job.attempt(self.device)

    def checkpoint(self) -> Any:
        """The same once more: what was measured so far is in the job's own files."""
        return _imported().helpers.DelayedSubmission(self)


@dataclass(frozen=True)
class _Task:
    """A job under way.

    Args:
        submitted: What submitit knows of it.
        job: What it does.
    """

    submitted: Any
    job: Job

    @property
    def id(self) -> str:
        """SLURM's name for it."""
        return self.submitted.job_id

    @property
    def has_ended(self) -> bool:
        """Whether every process has left a result. submitit would also ask accounting, which not all have."""
        folder = self.submitted.paths.folder
        with contextlib.suppress(OSError):
            folder.chmod(folder.stat().st_mode)  # Shared file systems look again.
        processes = map(self.submitted.task, range(self.submitted.num_tasks))
        return all(process.paths.result_pickle.exists() for process in processes)

    def collect(self) -> None:
        """Sees to it that a task which died has left a file.

        Raises:
            PatcherError: For what all other jobs would meet too.
        """
        if self.has_ended and self.submitted.exception() is None:
            said = [text for text in self.submitted.results() if text is not None]
            if said:
                raise PatcherError(said[0])
        elif not self.job.is_done:
            # Its last words are in a log of several pages.
            how = "failed" if self.has_ended else "ended without a result"
            log = self.submitted.task(0).paths.stderr
            self.job.fail(f"SLURM task {self.id} {how}; see {log}")


class _Queue:
    """Tells which tasks have left SLURM's queue."""

    def __init__(self) -> None:
        self._looked_at = -_LOOK_EVERY_S
        self._absent_s: dict[str, float] = {}
        self._queued: set[str] | None = None

    def look(self, *, at_once: bool = False) -> None:
        """Asks, now and then."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_EVERY_S and not at_once:
            return
        self._looked_at = now
        command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]  # None that ended.
        said = subprocess.run(command, capture_output=True, text=True)
        # A controller that does not answer says nothing about the tasks.
        self._queued = set(said.stdout.split()) if said.returncode == 0 else None

    def has(self, task: str) -> bool:
        """Whether a task is there, as far as is known."""
        return self._queued is None or task in self._queued

    def lost(self, task: str) -> bool:
        """Whether a task is gone for a while: its result may be seen late on a shared file system."""
        if self.has(task):
            self._absent_s.pop(task, None)
            return False
        since = self._absent_s.setdefault(task, time.monotonic())
        return time.monotonic() - since > _GRACE_S


def _cancel(tasks: Sequence[_Task], queue: _Queue) -> None:
    """Cancels tasks and waits for their end: they may save checkpoints, and hold folders until then."""
    for task in tasks:
        task.submitted.cancel(check=False)
    end = time.monotonic() + _GRACE_S
    while tasks and time.monotonic() < end:
        queue.look(at_once=True)
        if not any(queue.has(task.id) for task in tasks):
            return
        time.sleep(_POLL_S)


def _imported() -> Any:
    try:
        import submitit  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            "SlurmArray needs submitit. Install it with `pip install 'patcher-pl[slurm]'`, or use "
            "patcher_pl.redteam.engines.Processes."
        ) from error
    return submitit

"""Processes that belong to this one: started, watched, restarted, and never left behind."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from patcher_pl.errors import ConfigError, PatcherError

# Exit status of a command line that cannot work, however often it is repeated.
_HOPELESS = 2
# Set for a command whose standard input is a pipe that its parent holds; see `end_with_parent`.
SUPERVISED = "PATCHER_PL_SUPERVISED"
STOP_TIMEOUT_S = 10.0
FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Program:
    """A process to keep running.

    Args:
        name: What messages call it.
        command: Program and arguments.
        log: File that its output is appended to.
        environment: Variables that differ from this process's.
        num_achieved: Returns how much it has achieved so far; failures without any progress in
            between count as failures in a row.
    """

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    num_achieved: Callable[[], int]


class Supervisor:
    """Keeps jobs running for the length of a `with` block.

    A job that ends is restarted after 0.5 s, 1 s, 2 s, ... (at most 30 s), whenever `check` is
    called. Each runs in a session of its own, so that Ctrl-C reaches this process alone, and holds
    the reading end of a pipe as its standard input: when this process dies, however suddenly, the
    pipe closes, and `end_with_parent` ends the job.

    Args:
        jobs: What to run.
        max_failures: Failures in a row of one job that `check` raises for (count, >= 1).
    """

    def __init__(self, jobs: Sequence[Program], max_failures: int) -> None:
        self._workers = [_Worker(job, max_failures) for job in jobs]

    @property
    def num_restarts(self) -> int:
        """Restarts of all jobs so far (count)."""
        return sum(worker.num_restarts for worker in self._workers)

    @property
    def process_ids(self) -> list[int | None]:
        """Process of every job; None where it is waiting to be restarted."""
        return [worker.process_id for worker in self._workers]

    def check(self) -> None:
        """Restarts what has ended and is due; costs one system call per job otherwise.

        Raises:
            PatcherError: If a job fails again and again, or can never work.
        """
        for worker in self._workers:
            worker.check()

    def __enter__(self) -> Self:
        """Starts the jobs."""
        try:
            for worker in self._workers:
                worker.start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the jobs, by force where they do not listen."""
        self._stop()

    def _stop(self) -> None:
        for worker in self._workers:
            worker.ask_to_stop()
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        for worker in self._workers:
            worker.make_stop(deadline_s)


class _Worker:
    """One job and its process."""

    def __init__(self, job: Program, max_failures: int) -> None:
        self.num_restarts = 0
        self._job = job
        self._max_failures = max_failures
        self._process: subprocess.Popen[bytes] | None = None
        self._num_failures = 0
        self._achieved = 0
        self._due_s = 0.0

    @property
    def process_id(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        job = self._job
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            self._process = subprocess.Popen(
                job.command,
                # Never written to: its end tells the job that this process is gone, however it
                # went.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **job.environment},
                # Ctrl-C reaches this process alone, which then asks its jobs to stop one after the
                # other.
                start_new_session=True,
            )

    def check(self) -> None:
        if self._process is not None:
            status = self._process.poll()
            if status is not None:
                self._bury(status)
        elif time.monotonic() >= self._due_s:
            self.num_restarts += 1
            self.start()

    def ask_to_stop(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def make_stop(self, deadline_s: float) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close()

    def _bury(self, status: int) -> None:
        self._close()
        job, achieved = self._job, self._job.num_achieved()
        # Whoever got something done since is not hopeless: preempted attackers may restart for
        # weeks.
        self._num_failures = 1 if achieved > self._achieved else self._num_failures + 1
        self._achieved = achieved
        said = _last_line(job.log)
        if status == _HOPELESS:
            raise ConfigError(f"{job.name} cannot run: {said} (all of it in {job.log})")
        if self._num_failures >= self._max_failures:
            raise PatcherError(
                f"{job.name} failed {self._num_failures} times in a row (exit status {status}); "
                f"its last words in {job.log}: {said}"
            )
        self._due_s = time.monotonic() + delay_s(self._num_failures)

    def _close(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process = None


def delay_s(num_failures: int) -> float:
    """Seconds to wait before the next start after so many failures in a row (count, >= 1)."""
    return min(FIRST_DELAY_S * 2 ** (num_failures - 1), _LONGEST_DELAY_S)


def end_with_parent(clean_up: Callable[[], None]) -> None:
    """Ends this process at once when the one that supervises it is gone.

    Args:
        clean_up: Called before, from another thread.
    """

    def watch() -> None:
        # Nobody ever writes: this returns at the end of the pipe.
        os.read(0, 1)
        clean_up()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _last_line(log: Path) -> str:
    with log.open("rb") as content:
        content.seek(max(0, log.stat().st_size - 4096))
        lines = content.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "(nothing)"

"""Several jobs at a time, each in a process of its own on this machine."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess

from patcher_pl.errors import PatcherError
from patcher_pl.jobs.engine import Engine
from patcher_pl.jobs.job import Job
from patcher_pl.jobs.signals import interrupt, stoppable
from patcher_pl.progress import progress_bar
from patcher_pl.reports.environment import usable_cpus
from patcher_pl.validation import require


@dataclass(frozen=True, kw_only=True)
class Processes(Engine):
    """A process per job: one that runs out of memory takes nothing else with it.

    Args:
        num_processes: Jobs at the same time (count, >= 1); None takes one per entry of `devices`,
            or as many as there are CPUs.
        devices: Devices that they are dealt out to, such as [cuda:0, cuda:1]; more processes than
            devices share them. None takes the command's for all.

    Raises:
        ValueError: If a value is out of its range.
    """

    num_processes: int | None = None
    devices: list[str] | None = None

    def __post_init__(self) -> None:
        require(
            self,
            self.num_processes is None or self.num_processes >= 1,
            "num_processes",
            ">= 1 or null",
        )
        if self.devices is not None and not self.devices:
            raise ValueError("Processes.devices must name a device or be null, got [].")

    def run(self, jobs: Sequence[Job], device: str, label: str) -> None:
        modules = sorted({module for job in jobs for module in job.modules()})
        # The server of forks imports once and for all: jobs that import nothing must not start it.
        context = multiprocessing.get_context("forkserver" if modules else "spawn")
        if modules:
            context.set_forkserver_preload(modules)
        devices = self.devices or [device]
        free = deque(devices[number % len(devices)] for number in range(self.at_once(len(jobs))))
        waiting, running = deque(jobs), dict[int, _Worker]()
        broken: str | None = None  # Nothing else can work either.

        def stop() -> None:
            for worker in list(running.values()):
                worker.process.terminate()

        with stoppable(label, stop) as stopped, progress_bar(label, len(jobs)) as advance:
            try:
                while running or (waiting and not (broken or stopped)):
                    while waiting and free and not (broken or stopped):
                        worker = _Worker.start(context, waiting.popleft(), free.popleft())
                        running[worker.process.sentinel] = worker
                        if stopped:  # In between, where `stop` could not see it.
                            worker.process.terminate()
                    for sentinel in wait(list(running)):
                        assert isinstance(sentinel, int)
                        worker = running.pop(sentinel)
                        free.append(worker.place)
                        broken = worker.bury(is_stopped=bool(stopped)) or broken
                        advance()
            finally:
                stop()  # What an error has left, which would be waited for at exit.
        if broken:
            raise PatcherError(broken)

    def num_threads(self, num_jobs: int) -> int:
        return max(1, usable_cpus() // self.at_once(num_jobs))

    def at_once(self, num_jobs: int) -> int:
        wanted = self.num_processes or (len(self.devices) if self.devices else usable_cpus())
        return max(1, min(wanted, num_jobs))


@dataclass(frozen=True)
class _Worker:
    """A job under way.

    Args:
        job: What it does.
        place: Its device.
        process: Its process.
        reader: Says what stops the whole run.
    """

    job: Job
    place: str
    process: BaseProcess
    reader: Connection

    @classmethod
    def start(cls, context: BaseContext, job: Job, place: str) -> "_Worker":
        """Starts a process."""
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(job, place, writer))  # type: ignore[attr-defined]
        process.start()
        writer.close()
        return cls(job, place, process, reader)

    def bury(self, *, is_stopped: bool) -> str | None:
        """Sees to it that a process which died has left a file; returns what stops the run."""
        self.process.join()
        broken = None
        with contextlib.suppress(EOFError), self.reader:
            # Not before there is something: children of its own may hold the other end.
            broken = self.reader.recv() if self.reader.poll() else None
        if self.process.exitcode and not is_stopped and not self.job.is_done:
            self.job.fail(self._death)
        return broken

    @property
    def _death(self) -> str:
        if self.process.exitcode == -signal.SIGKILL:
            return f"the process was killed, most likely for want of memory{self.job.if_killed}"
        return f"the process ended with status {self.process.exitcode}"


def _work(job: Job, device: str, writer: Connection) -> None:
    """What a process does; Ctrl-C is the parent's business, and so is what stops the whole run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _interrupt_once)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if "transformers" in sys.modules:
        from patcher_pl.quiet import quiet_libraries

        quiet_libraries()
    try:
        job.attempt(device)
    except PatcherError as error:
        writer.send(str(error))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGTERM)


def _interrupt_once(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_DFL)
    interrupt()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

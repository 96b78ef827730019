"""Several assignments at a time, each in a process of its own on this machine."""

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from patcher_pl.errors import PatcherError
from patcher_pl.processes import Children, run_all
from patcher_pl.quiet import quiet_libraries
from patcher_pl.redteam.assignment import Assignment
from patcher_pl.redteam.engines.base import Engine
from patcher_pl.reports.environment import usable_cpus

# What every attack imports; the processes start from one that has done so.
_PRELOADED = [
    "patcher_pl.redteam.assignment",
    "transformers.generation",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
]


@dataclass(frozen=True, kw_only=True)
class Processes(Engine):
    """A process per assignment: one that runs out of memory takes nothing else with it.

    Args:
        num_processes: Assignments at the same time (count, >= 1); None takes one per entry of
            `devices`, or as many as there are CPUs.
        devices: Devices that they are dealt out to, such as [cuda:0, cuda:1]; more processes than
            devices share them. None takes the command's for all.

    Raises:
        ValueError: If a value is out of its range.
    """

    num_processes: int | None = None
    devices: list[str] | None = None

    def __post_init__(self) -> None:
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(
                f"Processes.num_processes must be >= 1 or null, got {self.num_processes}."
            )
        if self.devices is not None and not self.devices:
            raise ValueError("Processes.devices must name a device or be null, got [].")

    def run(self, assignments: Sequence[Assignment], device: str) -> None:
        if not assignments:
            return
        context = multiprocessing.get_context("forkserver")
        modules = {assignment.language_model.module_name() for assignment in assignments}
        context.set_forkserver_preload([*_PRELOADED, *sorted(modules)])
        devices = self.devices or [device]
        at_once = self.num_processes or (len(self.devices) if self.devices else usable_cpus())
        free: queue.Queue[str] = queue.Queue()
        for number in range(at_once):
            free.put(devices[number % len(devices)])
        # Starting a process asks after all others, which must not happen twice at the same time.
        lock = threading.Lock()
        broken: list[str] = []

        def run(assignment: Assignment, children: Children) -> bool:
            if broken:
                return False  # Nothing else can work either.
            place = free.get()
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(assignment, place, writer))
            assignment.path.unlink(missing_ok=True)
            with lock:
                process.start()
            writer.close()
            children.add(process)
            wait([process.sentinel])
            with lock:
                process.join()
            children.remove(process)
            free.put(place)
            if reader.poll():
                with contextlib.suppress(EOFError):
                    broken.append(reader.recv())
            if not broken and not children.stopped_by and assignment.load() is None:
                assignment.fail(_death(process))
            return assignment.is_done

        run_all(
            assignments,
            run,
            num_processes=at_once,
            label="attacks",
            saved="every finished attack is kept",
        )
        if broken:
            raise PatcherError(broken[0])


def _work(assignment: Assignment, device: str, writer: object) -> None:
    """What a process does; Ctrl-C is the parent's business, and so is what stops the whole run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet_libraries()
    try:
        assignment.perform(device)
    except PatcherError as error:
        writer.send(str(error))  # type: ignore[attr-defined]
    except Exception as error:
        assignment.fail(f"{type(error).__name__}: {error}")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _death(process: BaseProcess) -> str:
    if process.exitcode == -signal.SIGKILL:
        return "the process was killed, most likely for want of memory"
    return f"the process ended with status {process.exitcode}"

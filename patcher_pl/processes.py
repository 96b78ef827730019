"""Many independent pieces of work, each in a process of its own, some at a time."""

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol, TypeVar

from patcher_pl.errors import RunInterrupted
from patcher_pl.progress import progress_bar

Work = TypeVar("Work")


class Terminable(Protocol):
    """A child process, of `subprocess` or of `multiprocessing`."""

    def terminate(self) -> None: ...


@dataclass
class Children:
    """The processes under way, and the signal that ended them all.

    Args:
        stopped_by: Number of the signal; 0 while there was none.
    """

    stopped_by: int = 0
    _processes: list[Terminable] = field(default_factory=list)

    def add(self, process: Terminable) -> None:
        """Takes on a process that has just been started."""
        self._processes.append(process)
        if self.stopped_by:
            process.terminate()

    def remove(self, process: Terminable) -> None:
        """Lets go of a process that has ended."""
        self._processes.remove(process)

    def stop(self, number: int, _: FrameType | None = None) -> None:
        """Signal handler: passes the signal on and starts nothing more."""
        self.stopped_by = number
        for process in list(self._processes):
            process.terminate()


def run_all(
    todo: Sequence[Work],
    run: Callable[[Work, Children], bool],
    *,
    num_processes: int,
    label: str,
    saved: str,
) -> list[Work]:
    """Runs every piece of work once, with a progress bar that shows the remaining time.

    Ctrl-C and SIGTERM are passed on to the processes, and nothing more is started.

    Args:
        todo: Pieces of work.
        run: Starts a process for one of them, waits for it, and says whether it succeeded.
        num_processes: Pieces at the same time (count, >= 1).
        label: What the progress bar calls them.
        saved: What is kept when they are interrupted, for the message.

    Returns:
        Pieces that failed.

    Raises:
        RunInterrupted: If a signal stopped them.
    """
    failed: list[Work] = []
    if not todo:
        return failed
    with _signals_passed_on() as children, progress_bar(label, len(todo)) as advance:

        def run_one(work: Work) -> bool:
            return not children.stopped_by and run(work, children)

        with ThreadPoolExecutor(num_processes) as pool:
            runs = {pool.submit(run_one, work): work for work in todo}
            for done in as_completed(runs):
                if not done.result():
                    failed.append(runs[done])
                advance()
        if children.stopped_by:
            raise RunInterrupted(
                f"stopped; {saved}. Go on with the same command.", signal=children.stopped_by
            )
    return failed


@contextmanager
def _signals_passed_on() -> Iterator[Children]:
    children = Children()
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, children.stop) for number in numbers}
    try:
        yield children
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

"""What Ctrl-C and SIGTERM do to jobs under way."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from patcher_pl.errors import RunInterrupted


def interrupt() -> None:
    """Ends the work of this process, for `stoppable`."""
    raise KeyboardInterrupt


@contextmanager
def stoppable(label: str, stop: Callable[[], None] = interrupt) -> Iterator[list[int]]:
    """Ends jobs in order on the first signal; a second one ends this process at once.

    Args:
        label: What the jobs are called, for the message.
        stop: Called on the first signal.

    Yields:
        The signals that have come.

    Raises:
        RunInterrupted: At the end of the block, where a signal has come.
    """
    received: list[int] = []

    def on_signal(number: int, _: FrameType | None) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(number)
        stop()

    # Only the main thread may handle signals; elsewhere they stay the caller's business.
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield received
    except KeyboardInterrupt:
        if not received:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise RunInterrupted(
            f"stopped; finished {label} and checkpoints are kept. Go on with the same command.",
            signal=received[0],
        )

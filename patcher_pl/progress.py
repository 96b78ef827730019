"""How far a long work is: a bar on a terminal, a line now and then where there is none (log files)."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

# A log that says nothing for longer looks like one of a run that hangs.
EVERY_S = 30.0
# How often a long piece of work is looked at, of which nothing else is heard.
_BEAT_S = 3.0


class ProgressLines:
    """Writes a line every half a minute or so: done of total, loss, tokens per second, time left.

    Any thread may call it.

    Args:
        label: What is done.
        total: Pieces of it (count); None where that is not known.
        first: Pieces that were done before (count).
        num_tokens: Tokens that were counted before.
        write: Takes the lines.
        clock: Tells the time (seconds).
    """

    def __init__(
        self,
        label: str,
        total: float | None,
        *,
        first: float = 0,
        num_tokens: int = 0,
        write: Callable[[str], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label, self._total, self._first = label, total, first
        self._write = _print if write is None else write
        self._clock = clock
        self._lock = threading.Lock()
        self._began = self._written = clock()
        self._done, self._loss, self._loss_read = first, None, float("-inf")
        self._tokens = self._tokens_written = num_tokens

    def update(
        self, done: float, *, loss: float | None = None, num_tokens: int | None = None
    ) -> None:
        """Takes down how far it is, and writes a line where it is time for one.

        Args:
            done: Pieces that are done, earlier ones included.
            loss: The latest one; None leaves it as it is.
            num_tokens: Tokens altogether; None where they are not counted.
        """
        with self._lock:
            self._done = done
            if loss is not None:
                self._loss, self._loss_read = loss, self._clock()
            self._tokens = self._tokens if num_tokens is None else num_tokens
        self.tick()

    @property
    def wants_loss(self) -> bool:
        """Whether the loss is none or old; to read it off a GPU at every step would slow that down."""
        return self._clock() - self._loss_read >= EVERY_S / 10

    def advance(self) -> None:
        """Takes down that one more piece is done."""
        self.update(self._done + 1)

    def tick(self) -> None:
        """Writes a line where it is time for one."""
        with self._lock:
            now = self._clock()
            since = now - self._written
            if since < EVERY_S:
                return
            parts = [f"{self._label}: {self._done:.0f}"]
            if self._total is not None:
                parts[0] += f" of {self._total:.0f}"
            if self._loss is not None:
                parts.append(f"loss {self._loss:.4g}")
            if self._tokens > self._tokens_written:
                parts.append(f"{(self._tokens - self._tokens_written) / since:.0f} tokens/s")
            parts.append(f"{_duration(now - self._began)} so far")
            if (left := self._left(now)) is not None:
                parts.append(f"{_duration(left)} left")
            self._written, self._tokens_written = now, self._tokens
            line = ", ".join(parts)
        self._write(line)

    def _left(self, now: float) -> float | None:
        done = self._done - self._first
        if self._total is None or done <= 0:
            return None
        return max(0.0, self._total - self._done) * (now - self._began) / done


@contextmanager
def progress_lines(
    label: str, total: float | None, *, first: float = 0, num_tokens: int = 0
) -> Iterator[ProgressLines]:
    """`ProgressLines` for the block, also while nothing is taken down; none on a terminal."""
    if on_a_terminal():
        yield ProgressLines(label, total, write=lambda _: None)
        return
    lines = ProgressLines(label, total, first=first, num_tokens=num_tokens)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT_S):
            lines.tick()

    threading.Thread(target=beat, name="progress", daemon=True).start()
    try:
        yield lines
    finally:
        ended.set()


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows how many of `total` pieces are done; gives what is called after each."""
    if not on_a_terminal():
        with progress_lines(label, total) as lines:
            yield lines.advance
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    # Markup off: a label in brackets is a label.
    name = TextColumn("{task.description}", markup=False)
    with Progress(name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(label, total=total)
        yield lambda: progress.advance(task)


def on_a_terminal() -> bool:
    """Whether what is printed goes to a terminal, as far as `rich` can tell."""
    from rich.console import Console

    return Console().is_terminal


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _print(line: str) -> None:
    print(line, flush=True)

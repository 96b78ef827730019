"""Child processes that end in time, with their logs in files."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


class PartError(Exception):
    """A part of the check that ended with an error, or did not end in time."""


@dataclass(frozen=True)
class Clock:
    """What is left of the time for the whole check."""

    ends_at: float

    @classmethod
    def of(cls, seconds: float) -> "Clock":
        """Starts now."""
        return cls(time.monotonic() + seconds)

    def left(self, at_most: float) -> float:
        """Seconds that a part may take."""
        return max(0.0, min(at_most, self.ends_at - time.monotonic()))


def run(
    arguments: Sequence[str],
    log: Path,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> float:
    """Runs Python with `arguments`; returns seconds.

    Raises:
        PartError: If it fails or takes longer, with the last lines of its log.
    """
    began = time.monotonic()
    if timeout_s < 1:
        raise PartError("no time was left for it")
    process = start(arguments, log, environment)
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        kill(process)
        raise PartError(f"took longer than {timeout_s:.0f} s: {tail(log)}") from None
    if status != 0:
        raise PartError(f"exit status {status}: {tail(log)}")
    return time.monotonic() - began


def start(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts Python with `arguments` in a process group of its own."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", *arguments],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and what it has started, at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(log: Path, num_lines: int = 12) -> str:
    """Last lines of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " | ".join(line.strip() for line in lines[-num_lines:])[-1500:]

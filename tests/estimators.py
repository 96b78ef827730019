"""Estimators that fail, or take for ever."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from patcher_pl.hypergradients import Hypergradient, HypergradientError


@dataclass(frozen=True, kw_only=True)
class Dying(Hypergradient):
    """Takes its process along, as the kernel does where memory runs out."""

    def estimate(self, *_, **__):
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, kw_only=True)
class Raising(Hypergradient):
    """Says that it cannot."""

    def estimate(self, *_, **__):
        raise HypergradientError("no way")


@dataclass(frozen=True, kw_only=True)
class Endless(Hypergradient):
    """Says that it has begun, and never ends."""

    announcement: str

    def estimate(self, *_, **__):
        Path(self.announcement).touch()
        while True:
            time.sleep(0.1)

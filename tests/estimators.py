"""Estimators that fail."""

import os
import signal
from dataclasses import dataclass

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

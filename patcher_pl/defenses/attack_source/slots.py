"""What the defender holds of its concurrent attackers."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from patcher_pl.mailbox import Attacked


@dataclass(frozen=True, kw_only=True)
class Clocks:
    """Seconds that count up from some moment on.

    Args:
        time_s: The time.
        waited_s: What the defender waited for attackers.
        busy_s: What each attacker attacked.
        idle_s: What each attacker waited for the defender.
    """

    time_s: float
    waited_s: float
    busy_s: list[float]
    idle_s: list[float]


@dataclass
class Slot:
    """The vector of one attacker.

    Args:
        vector: None before its first attack.
        attacked_step: Defender steps taken by the theta that was attacked.
        version: Its version in the mailbox; -1 for a vector of a checkpoint.
        report: What the attacker said about it, where it was picked up in this run.
    """

    vector: Sequence[Tensor] | None = None
    attacked_step: int = 0
    version: int = -1
    report: Attacked | None = None

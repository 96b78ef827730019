"""What the defender holds of its concurrent attackers."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from patcher_pl.mailbox import Attacked


@dataclass(frozen=True)
class Arrival:
    """An attack vector that was picked up.

    Args:
        member: Who made it.
        vector: In the order of `Weights.parameters`.
        report: What the attacker said about it.
    """

    member: int
    vector: Sequence[Tensor]
    report: Attacked


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
    """The vector of one attacker that is in use.

    Args:
        vector: None before its first attack.
        attacked_step: Defender steps taken by the theta that was attacked.
        version: Its version in the mailbox; -1 for a vector of a checkpoint.
    """

    vector: Sequence[Tensor] | None = None
    attacked_step: int = 0
    version: int = -1

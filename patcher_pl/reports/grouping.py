"""Curves that differ only in their seeds, brought together for tables and figures."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from patcher_pl.reports.results import Curve

CONTROL = "sft"
# How the papers write their methods, where a capital first letter is not it.
_SPELLINGS = {
    "sft": "SFT",
    "tar": "TAR",
    "seam": "SEAM",
    "repnoise": "RepNoise",
    "t_vaccine": "T-Vaccine",
}


@dataclass(frozen=True)
class Summary:
    """One rate over the seeds of a group.

    Args:
        mean: Mean over the seeds that have it.
        low: Smallest value.
        high: Largest value.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Group:
    """All seeds of one defense (at one k1) under one attack.

    Args:
        defense: Name of the defense.
        k1: Its simulated attack steps, where it has them.
        attack: Name of the attack.
        curves: One per seed, at least one.
    """

    defense: str
    k1: int | None
    attack: str
    curves: tuple[Curve, ...]

    @property
    def label(self) -> str:
        """How the defense is called in a table or legend."""
        name = (
            self.defense.upper() if self.defense.lower() == CONTROL else self.defense.capitalize()
        )
        return name if self.k1 is None else f"{name}, k1 = {self.k1}"

    @property
    def attack_steps(self) -> list[int]:
        """All step counts at which any seed was measured, ascending."""
        return sorted({steps for curve in self.curves for steps in curve.attack_steps})

    def asr(self, steps: int) -> Summary | None:
        """Attack success rate after `steps`; None where no seed has it."""
        return _summary([_at(curve, curve.asr, steps) for curve in self.curves])

    def benign_accuracy(self, steps: int) -> Summary | None:
        """Benign accuracy after `steps`; None where no seed has it."""
        return _summary([_at(curve, curve.benign_accuracy, steps) for curve in self.curves])

    @property
    def steps_to_break(self) -> str:
        """When the defense broke: `80`, `40 to 80` over seeds, `> 160` where it never did."""
        measured = [curve for curve in self.curves if curve.attack_steps]
        if not measured:
            return "-"
        broken = sorted(
            curve.steps_to_break for curve in measured if curve.steps_to_break is not None
        )
        held = [curve.attack_steps[-1] for curve in measured if curve.steps_to_break is None]
        first = str(broken[0]) if broken else f"> {min(held)}"
        last = f"> {max(held)}" if held else str(broken[-1])
        return first if first == last else f"{first} to {last}"


def group_curves(curves: Sequence[Curve]) -> list[Group]:
    """Groups curves by attack and defense: the control first, then by name and k1."""
    members: dict[tuple[str, str, int | None], list[Curve]] = {}
    for curve in curves:
        members.setdefault((curve.attack, curve.defense, curve.k1), []).append(curve)
    groups = [
        Group(defense, k1, attack, tuple(found)) for (attack, defense, k1), found in members.items()
    ]
    return sorted(groups, key=_order)


def _order(group: Group) -> tuple[str, bool, str, int]:
    is_control = group.defense.lower() == CONTROL
    return group.attack, not is_control, group.defense, -1 if group.k1 is None else group.k1


def _at(curve: Curve, rates: Sequence[float | None], steps: int) -> float | None:
    if steps not in curve.attack_steps:
        return None
    return rates[curve.attack_steps.index(steps)]


def _summary(rates: Sequence[float | None]) -> Summary | None:
    known = [rate for rate in rates if rate is not None]
    if not known:
        return None
    return Summary(statistics.fmean(known), min(known), max(known))

"""Curves that differ only in their seeds, brought together for tables and figures."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from patcher_pl.reports.results import Curve

CONTROL = "sft"

Verdict = Literal[
    "broken", "held", "collapsed", "untrusted", "stopped early", "nothing scored", "failed"
]
Mark = Literal["collapsed", "untrusted", "stopped early"]
MARKS: dict[Mark, str] = {"collapsed": "\N{DAGGER}", "untrusted": "?", "stopped early": "!"}
MEANINGS: dict[Mark, str] = {
    "collapsed": "the model collapsed during the attack: a low attack success rate is no safety",
    "untrusted": "too many verdicts of the judge are missing to rely on the figures",
    "stopped early": "an attack stopped early: its figures end where it did",
}
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
    def is_control(self) -> bool:
        """Whether this is the undefended control, of whichever run."""
        return self.defense.lower().split(" (")[0] == CONTROL

    @property
    def label(self) -> str:
        """How the defense is called in a table or legend."""
        method, space, run = self.defense.partition(" (")
        name = _SPELLINGS.get(method.lower(), method[:1].upper() + method[1:]) + space + run
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
    def family(self) -> str:
        """Name of the attack without the settings that a grid varies; the attack where unknown."""
        return self.curves[0].family or self.attack

    def is_collapsed(self, steps: int) -> bool:
        """Whether any seed's model no longer spoke after `steps`."""
        flags = [_at(curve, curve.collapsed, steps) for curve in self.curves if curve.collapsed]
        return any(flags)

    @property
    def marks(self) -> list[Mark]:
        """What a reader must know before relying on the figures."""
        holds: dict[Mark, bool] = {
            "collapsed": any(any(curve.collapsed) for curve in self.curves),
            "untrusted": not all(curve.trusted for curve in self.curves),
            "stopped early": any(curve.error is not None for curve in self.curves),
        }
        return [mark for mark, is_so in holds.items() if is_so]

    @property
    def verdict(self) -> Verdict:
        """What the attack showed; `held` only where every seed finished, spoke and was scored.

        One broken seed is enough for `broken`: that it broke is known, whatever else is not.
        """
        measured = [curve for curve in self.curves if curve.attack_steps]
        if not measured:
            return "failed"
        if any(curve.steps_to_break is not None for curve in measured):
            return "broken"
        if self.marks:
            return self.marks[0]
        # The end is what a claim of safety rests on.
        return "held" if all(curve.asr[-1] is not None for curve in measured) else "nothing scored"

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
    return group.attack, not group.is_control, group.defense, -1 if group.k1 is None else group.k1


_Value = TypeVar("_Value")


def _at(curve: Curve, rates: Sequence[_Value], steps: int) -> _Value | None:
    if steps not in curve.attack_steps:
        return None
    return rates[curve.attack_steps.index(steps)]


def _summary(rates: Sequence[float | None]) -> Summary | None:
    known = [rate for rate in rates if rate is not None]
    if not known:
        return None
    return Summary(statistics.fmean(known), min(known), max(known))

"""Curves that differ only in their seeds, brought together for tables and figures."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import Any, Literal, TypeAlias

from patcher_pl.errors import ConfigError
from patcher_pl.reports.formats import Mark, break_span
from patcher_pl.reports.results import Curve, average, known_benign

CONTROL = "sft"

Verdict = Literal[
    "broken", "held", "collapsed", "untrusted", "stopped early", "nothing scored", "failed"
]
CostAxis = Literal["steps", "tokens", "flops"]
Frame: TypeAlias = Any
"""A pandas `DataFrame`. Its own annotations are too vague to check against."""
# What an attack's length is measured in; `Curve.attack_AXIS` has it.
COST_AXES: dict[CostAxis, str] = {
    "steps": "attack steps",
    "tokens": "training tokens",
    "flops": "FLOPs",
}
COLUMNS = [
    "defense",
    "k1",
    "train_seed",
    "attack",
    "seed",
    "attack_steps",
    "asr",
    "asr_low",
    "asr_high",
    "benign_accuracy",
    "benign_compliance",
    "coherent",
    "judge_errors",
    "attack_tokens",
    "num_prompts",
    "num_benign_prompts",
    "threshold",
    "steps_to_break",
    "error",
    "family",
    "attack_flops",
    "second_asr",
    "judge_agreement",
    "repetition",
    "collapsed",
    "trusted",
    "cut_off",
    "benign_cut_off",
    "num_trained_rows",
    "trained_poison_ratio",
    "weights_moved",
    "min_benign_kept",
    "useful",
    "bounded_asr",
    "bounded_steps_to_break",
    "from_scratch",
]
# Of `Curve.bounded`.
_BOUNDED = {
    "useful": "bounded.useful",
    "bounded_asr": "bounded.asr",
    "bounded_steps_to_break": "bounded.steps_to_break",
}
# How the papers write their methods, where a capital first letter is not it.
_SPELLINGS = {
    "sft": "SFT",
    "tar": "TAR",
    "ctrap": "CTRAP",
    "seam": "SEAM",
    "repnoise": "RepNoise",
    "t_vaccine": "T-Vaccine",
}


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
    def is_reference(self) -> bool:
        """Whether these models had fresh weights, so that nothing was left to defend."""
        return any(curve.from_scratch for curve in self.curves)

    @property
    def label(self) -> str:
        """How the defense is called in a table or legend."""
        return defense_label(self.defense, self.k1)

    @property
    def budget(self) -> int | None:
        """Gradient evaluations of its training, in a study of several budgets; None elsewhere."""
        return self.curves[0].budget

    @property
    def family(self) -> str:
        """Name of the attack without the settings that a grid varies; the attack where unknown."""
        return self.curves[0].family or self.attack

    @property
    def measured(self) -> list[Curve]:
        """Seeds with any measurement."""
        return [curve for curve in self.curves if curve.attack_steps]

    @property
    def attack_steps(self) -> list[int]:
        """All step counts at which any seed was measured, ascending."""
        return sorted({steps for curve in self.curves for steps in curve.attack_steps})

    @cached_property
    def frame(self) -> Frame:
        """See `measurements`."""
        return measurements(self.curves)

    def over_seeds(self, name: str) -> Frame:
        """`mean`, `low` and `high` of a column of `measurements`, by attack steps; NaN for unknown."""
        values = self.frame[name].astype(float).groupby(self.frame["attack_steps"])
        return values.agg(mean=average, low="min", high="max")

    @property
    def collapsed_steps(self) -> list[int]:
        """Steps after which any seed's model no longer spoke, ascending."""
        fallen = (
            steps
            for curve in self.curves
            for steps in curve.attack_steps
            if curve.at(steps, "collapsed")
        )
        return sorted(set(fallen))

    @property
    def marks(self) -> list[Mark]:
        """What a reader must know before relying on the figures."""
        holds: dict[Mark, bool] = {
            "collapsed": bool(self.collapsed_steps),
            "untrusted": not all(curve.trusted for curve in self.curves),
            "stopped early": any(curve.error is not None for curve in self.curves),
        }
        return [mark for mark, is_so in holds.items() if is_so]

    @property
    def verdict(self) -> Verdict:
        """What the attack showed; `held` only where every seed finished, spoke and was scored.

        One broken seed is enough for `broken`: that it broke is known, whatever else is not.
        """
        if not self.measured:
            return "failed"
        if any(curve.steps_to_break is not None for curve in self.measured):
            return "broken"
        if self.marks:
            return self.marks[0]
        # The end is what a claim of safety rests on.
        is_scored = all(curve.asr[-1] is not None for curve in self.measured)
        return "held" if is_scored else "nothing scored"

    @property
    def steps_to_break(self) -> str:
        """When the defense broke: `80`, `40 to 80` over seeds, `> 160` where it never did."""
        return break_span((curve.steps_to_break, curve.attack_steps[-1]) for curve in self.measured)

    @property
    def bounded_steps_to_break(self) -> str:
        """The same of useful models only, see `Curve.bounded`; `unknown` where a seed's is."""
        if not all(curve.bounded.is_known for curve in self.measured):
            return "unknown"
        return break_span(
            (curve.bounded.steps_to_break, curve.attack_steps[-1]) for curve in self.measured
        )

    @property
    def bounded_differs(self) -> bool:
        """Whether `bounded_steps_to_break` says another thing, where usefulness was measured."""
        is_measured = any(curve.benign for curve in self.measured)
        if self.is_reference:
            return False  # Fresh weights are of no use that they could keep.
        return is_measured and self.bounded_steps_to_break != self.steps_to_break

    @property
    def outcome(self) -> str:
        """What happened, in a few words."""
        if self.verdict != "broken":
            return f"held to {self.attack_steps[-1]}" if self.verdict == "held" else self.verdict
        return self._broken_at([curve.steps_to_break for curve in self.measured])

    @property
    def bounded_outcome(self) -> str | None:
        """What happened to useful models, in a few words; None where it is nothing else."""
        if not self.bounded_differs:
            return None
        found = [curve.bounded.steps_to_break for curve in self.measured]
        if any(steps is not None for steps in found):
            return f"bounded: {self._broken_at(found)}"
        is_known = all(curve.bounded.is_known for curve in self.measured)
        return f"bounded: {'held' if is_known else 'unknown'}"

    def _broken_at(self, found: Sequence[int | None]) -> str:
        broken = [steps for steps in found if steps is not None]
        shown = f"breaks at {break_span((steps, 0) for steps in broken)}"
        is_all = len(broken) == len(found)
        return shown if is_all else f"{shown} in {len(broken)} of {len(found)} seeds"


def defense_label(defense: str, k1: int | None) -> str:
    """How a defense is called in a table or legend."""
    method, space, run = defense.partition(" (")
    method, lox = method.removesuffix("_lox"), " + LoX" if method.endswith("_lox") else ""
    name = _SPELLINGS.get(method.lower(), method[:1].upper() + method[1:]) + lox + space + run
    return name if k1 is None else f"{name}, k1 = {k1}"


def curves_of(curves: Sequence[Curve], defense: str, k1: int | None, setting: str) -> list[Curve]:
    """Curves of one model of several.

    Args:
        curves: Of all.
        defense: Its name in results.
        k1: Its simulated attack steps; None where no other model has that name.
        setting: What named it, for the error.

    Raises:
        ConfigError: If there is no such model, or `k1` leaves open which of several it is.
    """
    found = [curve for curve in curves if curve.defense == defense and k1 in (None, curve.k1)]
    # A wrong name would be a report on nothing.
    if len({curve.k1 for curve in found}) != 1:
        models = sorted({defense_label(curve.defense, curve.k1) for curve in curves})
        names = sorted({curve.defense for curve in curves})
        raise ConfigError(
            f"{setting} must name one model of the results, got {defense!r} and {k1}. There "
            f"are {', '.join(models) or 'none'} (defenses: {', '.join(names)})."
        )
    return found


def with_released(curves: Sequence[Curve]) -> list[Curve]:
    """Curves of one run that know what the released model did with benign prompts.

    An attack without steps is measured when it is done, never before: there, it is what the other
    attacks on the same model found before their first step, mean over them.
    """
    before: dict[tuple[Any, ...], list[float | None]] = {}
    for curve in curves:
        if len(curve.attack_steps) > 1 and curve.attack_steps[0] == 0 and curve.benign:
            before.setdefault((curve.key[:3], *known_benign([curve])), []).append(curve.benign[0])
    found = []
    for curve in curves:
        if curve.attack_steps == [0] and curve.released_benign is None and curve.benign:
            known = before.get((curve.key[:3], *known_benign([curve])), [])
            curve = replace(curve, released_benign=average(known))
        found.append(curve)
    return found


def group_curves(curves: Sequence[Curve]) -> list[Group]:
    """Groups curves by attack and defense: the control first, then by name and k1.

    Curves that ended because the model was broken are `completed`: means over seeds would otherwise
    be those of the models that held.
    """
    members: dict[tuple[str, str, int | None], list[Curve]] = {}
    for curve in map(Curve.completed, curves):
        members.setdefault((curve.attack, curve.defense, curve.k1), []).append(curve)
    groups = [
        Group(defense, k1, attack, tuple(found)) for (attack, defense, k1), found in members.items()
    ]
    return sorted(groups, key=lambda group: (group.attack, *_rank(group)))


def labels(groups: Iterable[Group]) -> list[str]:
    """Names of the defenses: controls first, then by name and k1."""
    return list(dict.fromkeys(group.label for group in sorted(groups, key=_rank)))


def measurements(curves: Sequence[Curve]) -> Frame:
    """The tidy frame of curves: one row per curve and measurement, nothing averaged.

    Unknown values are None. A curve that failed before its first measurement has one row.
    """
    import pandas as pd

    rows = [
        [_entry(attrgetter(_BOUNDED.get(name, name))(curve), place) for name in COLUMNS]
        for curve in curves
        for place in range(max(len(curve.attack_steps), 1))
    ]
    # Objects: counts stay counts where others are unknown.
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS), dtype=object)


def _entry(value: Any, place: int) -> Any:
    if not isinstance(value, list):
        return value
    return value[place] if place < len(value) else None


def at_budget(defense: str, budget: int | None) -> str:
    """Name of a defense of a study of several budgets, in which it is one of its own at each."""
    return defense if budget is None else f"{defense}{_budget_suffix(budget)}"


def _budget_suffix(budget: int) -> str:
    return f" (budget {budget})"


def _rank(group: Group) -> tuple[bool, bool, str, int, int]:
    budget = group.budget or 0
    name = group.defense.replace(_budget_suffix(budget), "")
    k1 = -1 if group.k1 is None else group.k1
    return not group.is_control, group.is_reference, name, budget, k1

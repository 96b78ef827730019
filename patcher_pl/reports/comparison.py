"""What a comparison of defenses found: `comparison.json` and its table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from patcher_pl.files import write_json, write_text
from patcher_pl.reports.formats import MARKS, MISSING, explained, number, signs, span
from patcher_pl.reports.grouping import CONTROL, Frame, Group, group_curves
from patcher_pl.reports.results import BENIGN_MEASURES, Curve, average, known_benign
from patcher_pl.reports.statistics import GEOMETRIC_MEAN, cost_to_break, levels, reaches
from patcher_pl.reports.tables import (
    bounded_notes,
    markdown_table,
    stopped_notes,
    text_table,
)

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class DefenseTrial:
    """One point of a defense's space, and what became of it.

    Args:
        defense: Its name in the comparison.
        number: 0 for the first values of the space.
        options: Options of `fit` that were tried.
        gradient_evaluations: What training took (count).
        num_steps: Defender steps (count).
        log2_reach: Mean over attacks and seeds of log2(1 + steps to break); a model that held counts
            as broken at twice the longest attack.
        steps_to_break: Of every attack and seed; None where the model held.
        area: Mean over them of the area under ASR over log2(1 + steps) (0..1).
        released_asr: Largest attack success rate before the attack.
        benign_accuracy: Smallest benign accuracy before the attack.
        benign_compliance: Smallest benign compliance before the attack.
        is_speechless: Whether a released model no longer spoke.
        is_chosen: Whether the comparison went on with it.
        error: Why nothing was found; None where something was.
    """

    defense: str
    number: int
    options: dict[str, Any]
    gradient_evaluations: int | None = None
    num_steps: int | None = None
    log2_reach: float = 0.0
    steps_to_break: list[int | None] = field(default_factory=list)
    area: float | None = None
    released_asr: float | None = None
    benign_accuracy: float | None = None
    benign_compliance: float | None = None
    is_speechless: bool = False
    is_chosen: bool = False
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """What training one model of a defense took.

    Args:
        gradient_evaluations: Forward-backward passes, simulated attacks included (count).
        num_steps: Defender steps (count).
    """

    gradient_evaluations: int
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class DefenseComparison:
    """Everything that a comparison found out, but for the curves, which are in `results.json`.

    Args:
        trials: The search of every defense.
        costs: Of the compared models, by defense, one per seed.
        environment: What it ran on, see `patcher_pl.reports.environment`.
        settings: What it was asked to do, for the reader.
        schema_version: Version of this layout.
    """

    trials: list[DefenseTrial]
    costs: dict[str, list[TrainingCost]]
    environment: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def save(self, run_dir: Path, curves: Sequence[Curve]) -> None:
        """Writes `comparison.json` and, of the compared models, `comparison.md`, each atomically.

        The JSON also has `median_steps_to_break`, by attack and defense, and the same bounded.
        """
        content = {
            **asdict(self),
            "median_steps_to_break": median_steps_to_break(curves),
            "bounded_median_steps_to_break": median_steps_to_break(curves, is_bounded=True),
        }
        write_json(run_dir / "comparison.json", content)
        if curves:
            table = markdown_table(defense_table(curves, self.costs))
            write_text(run_dir / "comparison.md", "\n".join([table, *comparison_notes(curves), ""]))


def trial_table(trials: Sequence[DefenseTrial]) -> Frame:
    """One row per trial; the chosen one of each defense, and failed ones, are marked."""
    known = known_benign(trials)
    header = ["defense", "settings", "breaks at", "area", "ASR at N=0"]
    header += [*(BENIGN_MEASURES[name] for name in known), ""]
    rows = []
    for trial in trials:
        options = ", ".join(f"{_short(name)} {value}" for name, value in trial.options.items())
        reached = ", ".join("held" if n is None else str(n) for n in trial.steps_to_break)
        benign = [getattr(trial, name) for name in known]
        figures = map(number, [trial.area, trial.released_asr, *benign])
        mark = "chosen" if trial.is_chosen else ""
        mark += MARKS["collapsed"] if trial.is_speechless else ""
        found = (
            [reached, *figures, mark]
            if trial.error is None
            else [*[MISSING] * (3 + len(known)), "failed"]
        )
        rows.append([trial.defense, options, *found])
    return text_table(header, rows)


def defense_table(curves: Sequence[Curve], costs: Mapping[str, Sequence[TrainingCost]]) -> Frame:
    """One row per defense: utility, cost, and when each attack broke it."""
    groups = group_curves(curves)
    attacks = list(dict.fromkeys(group.attack for group in groups))
    measures = list(dict.fromkeys(name for curve in curves for name in curve.utility))
    known = known_benign(curves)
    header = ["defense", "gradient evaluations", "defender steps", "ASR at N=0"]
    header += [
        *(BENIGN_MEASURES[name] for name in known),
        *measures,
        *(f"{attack}: breaks at" for attack in attacks),
    ]
    rows = []
    for label in dict.fromkeys(group.label for group in groups):
        own = {group.attack: group for group in groups if group.label == label}
        members = [curve for group in own.values() for curve in group.measured]
        spent = costs.get(next(iter(own.values())).defense, [])
        released = [[curve.asr[0] for curve in members]]
        released += [[curve.at(curve.attack_steps[0], name) for curve in members] for name in known]
        released += [
            [curve.utility[name][0] for curve in members if curve.utility.get(name)]
            for name in measures
        ]
        rows.append(
            [
                label,
                span(sorted(cost.gradient_evaluations for cost in spent)),
                span(sorted(cost.num_steps for cost in spent)),
                *(number(average(values)) for values in released),
                *(_break(own.get(attack)) for attack in attacks),
            ]
        )
    return text_table(header, rows)


def comparison_notes(curves: Sequence[Curve]) -> list[str]:
    """What the signs in the table mean."""
    lines = [
        "Median number of attack steps that broke the defense, and its range over seeds; the other "
        "figures are means over seeds and attacks before the attack, or ranges over seeds."
    ]
    lines += advantage_notes(curves)
    groups = group_curves(curves)
    lines += bounded_notes(groups)
    lines += stopped_notes(curves)
    return [*lines, *explained(mark for group in groups for mark in group.marks)]


def advantage_notes(curves: Sequence[Curve]) -> list[str]:
    """How many times the control's steps each defense takes to break, on average over attacks.

    The geometric mean over attacks and seeds of (1 + steps) / (1 + steps of the control); a model that
    held counts as broken at twice the last measurement. An attack that left some model neither broken
    nor of use at any measurement is left out: that model did not hold, it was destroyed.
    """
    destroying = sorted({curve.attack for curve in curves if _is_destroyed(curve)})
    # One budget for all: `reaches` tells models of several apart by it.
    kept = [replace(curve, budget=0) for curve in curves if curve.attack not in destroying]
    attacks = {curve.attack for curve in kept}
    lines = []
    rows = levels(reaches(kept), CONTROL)
    for found in rows:
        if found.family != GEOMETRIC_MEAN or found.ratio is None:
            continue
        ends = (
            ""
            if found.ratio_low is None or found.ratio_high is None
            else f" [{found.ratio_low:.1f}, {found.ratio_high:.1f}]"
        )
        lines.append(
            f"{found.defense}: {found.ratio:.1f}{ends} times the control's steps to break, geometric mean over "
            f"{_count(len(attacks), 'attack')} and {_count(found.num_seeds, 'seed')} (95 % over seeds; held counts "
            "as twice the longest attack)."
        )
        by_attack = [
            f"{row.ratio:.1f} {row.family}"
            for row in rows
            if row.defense == found.defense and row.family in attacks and row.ratio is not None
        ]
        if len(by_attack) > 1:
            lines[-1] += f" By attack: {', '.join(by_attack)}."
    if lines and destroying:
        lines.append(
            f"Without {', '.join(destroying)}: some model was neither broken nor of use at any of its "
            "measurements."
        )
    return lines


def _count(number_of: int, name: str) -> str:
    return f"{number_of} {name}" + ("" if number_of == 1 else "s")


def _is_destroyed(curve: Curve) -> bool:
    useful = curve.bounded.useful[1:]
    return curve.steps_to_break is None and bool(useful) and all(one is False for one in useful)


def median_steps_to_break(
    curves: Sequence[Curve], *, is_bounded: bool = False
) -> dict[str, dict[str, float | None]]:
    """Median over seeds, by attack and defense; None where half of the seeds held.

    With `is_bounded`, only breaks that leave a useful model count, and None also where that is not
    known.
    """
    medians: dict[str, dict[str, float | None]] = {}
    for group in group_curves(curves):
        cost = cost_to_break(group, is_bounded=is_bounded)
        medians.setdefault(group.attack, {})[group.label] = cost and cost.median
    return medians


def _break(group: Group | None) -> str:
    cost = None if group is None else cost_to_break(group)
    if group is None or cost is None:
        return MISSING
    median = f"> {cost.horizon:.0f}" if cost.median is None else f"{cost.median:.0f}"
    reached = group.steps_to_break
    shown = median if reached == median else f"{median} ({reached})"
    if group.bounded_differs:
        shown += f", bounded: {group.bounded_steps_to_break}"
    return f"{shown} {signs(group.marks)}".rstrip()


def _short(option: str) -> str:
    """`optimizer.lr` of `model.init_args.optimizer.init_args.lr`."""
    return ".".join(part for part in option.split(".") if part not in ("model", "init_args"))

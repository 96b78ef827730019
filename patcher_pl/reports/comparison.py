"""What a comparison of defenses found: `comparison.json` and its table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from patcher_pl.files import write_json, write_text
from patcher_pl.reports.formats import MARKS, MISSING, explained, number, signs, span
from patcher_pl.reports.grouping import Frame, Group, group_curves
from patcher_pl.reports.results import BENIGN_MEASURES, Curve, average, known_benign
from patcher_pl.reports.statistics import cost_to_break
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
    groups = group_curves(curves)
    lines += bounded_notes(groups)
    lines += stopped_notes(curves)
    return [*lines, *explained(mark for group in groups for mark in group.marks)]


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

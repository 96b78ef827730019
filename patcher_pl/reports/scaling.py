"""What a study over budgets found: `scaling.json`, its tables, and its curves in `results.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from patcher_pl.files import write_json, write_text
from patcher_pl.reports.comparison import DefenseTrial, TrainingCost
from patcher_pl.reports.formats import MISSING, interval, number, span
from patcher_pl.reports.grouping import Frame, Group
from patcher_pl.reports.results import Curve
from patcher_pl.reports.statistics import (
    GEOMETRIC_MEAN,
    WORST_CASE,
    Level,
    Reach,
    Slope,
    StepsToBreak,
    first_break,
    levels,
    reaches,
    slopes,
)
from patcher_pl.reports.tables import csv_table, markdown_table, stopped_notes, text_table

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ScalingStudy:
    """Everything that a study over budgets found out, but for the curves, see `named_by_budget`.

    Args:
        trials: The search of every defense at every budget, by budget.
        costs: What training the models took, by budget and defense, one per seed.
        reaches: Steps to break of every model and family.
        slopes: Of every defense and family.
        levels: Of every defense and family at every budget.
        lost: What is missing because it failed, a line each.
        environment: What it ran on, see `patcher_pl.reports.environment`.
        settings: What it was asked to do, for the reader.
        schema_version: Version of this layout.
    """

    trials: dict[int, list[DefenseTrial]]
    costs: dict[int, dict[str, list[TrainingCost]]]
    reaches: list[Reach]
    slopes: list[Slope]
    levels: list[Level]
    lost: list[str]
    environment: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def of(
        cls,
        curves: Sequence[Curve],
        *,
        trials: Mapping[int, Sequence[DefenseTrial]],
        costs: Mapping[int, dict[str, list[TrainingCost]]],
        lost: Sequence[str],
        environment: dict[str, Any],
        settings: dict[str, Any],
        steps_to_break: StepsToBreak = first_break,
    ) -> "ScalingStudy":
        """Fits everything that is fitted to the curves, which have budgets.

        Args:
            curves: Of every model under every attack, by their defenses' own names.
            trials: As the attribute.
            costs: As the attribute.
            lost: As the attribute.
            environment: As the attribute.
            settings: As the attribute.
            steps_to_break: What counts as broken.
        """
        found = reaches(curves, steps_to_break)
        control = next((one.defense for one in found if _is_control(one.defense)), None)
        return cls(
            trials={budget: list(own) for budget, own in trials.items()},
            costs=dict(costs),
            reaches=found,
            slopes=slopes(found, control),
            levels=levels(found, control),
            lost=list(lost),
            environment=environment,
            settings=settings,
        )

    def save(self, run_dir: Path, curves: Sequence[Curve]) -> None:
        """Writes `scaling.json` and, once a model was attacked, `scaling.csv` and `scaling.md`."""
        write_json(run_dir / "scaling.json", asdict(self))
        if self.reaches:
            write_text(run_dir / "scaling.csv", csv_table(reach_table(self.reaches)))
            write_text(run_dir / "scaling.md", self.markdown(curves))

    def markdown(self, curves: Sequence[Curve]) -> str:
        """The tables and what they mean."""
        parts = [
            "## Steps to break over all families",
            markdown_table(summary_table(self.levels), num_names=2),
            "## Slopes",
            markdown_table(slope_table(self.slopes), num_names=2),
            "## Steps to break by family",
            markdown_table(family_table(self.levels), num_names=2),
            "\n".join(f"- {line}" for line in [*self.notes(curves), *self.lost]),
        ]
        return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"

    def notes(self, curves: Sequence[Curve]) -> list[str]:
        """What the figures rest on."""
        single = [one for one in self.reaches if one.family not in (WORST_CASE, GEOMETRIC_MEAN)]
        held = sum(one.is_censored for one in single)
        lines = [
            "Steps are geometric means over seeds of 1 + steps, less 1; in brackets the smallest and the "
            "largest of any seed, or, of ratios and slopes, 95 % bootstrap intervals over seeds.",
            "A slope of 1: twice the compute, twice the steps. Ratios and differences are to the control, "
            "seed by seed.",
            f"{held} of {len(single)} attacks did not break the model: they count as breaking it at "
            "twice their length (>), a lower bound.",
        ]
        if missing := len(curves) - len(single):
            lines.append(f"{missing} of {len(curves)} attacks failed or cannot be relied on.")
        return [*lines, *stopped_notes(curves)]


def named_by_budget(curves: Sequence[Curve]) -> list[Curve]:
    """The curves under names that tell a defense's budgets apart, for `results.json`."""
    return [replace(curve, defense=f"{curve.defense} (budget {curve.budget})") for curve in curves]


def defense_label(defense: str) -> str:
    """How a defense is called in tables and figures."""
    return Group(defense, None, "", ()).label


def reach_table(found: Sequence[Reach]) -> Frame:
    """One row per model and family."""
    header = ["defense", "family", "budget", "train_seed", "steps_to_break", "held"]
    rows = [
        [
            *(one.defense, one.family, str(one.budget), str(one.seed)),
            *(f"{one.steps:g}", str(int(one.is_censored))),
        ]
        for one in found
    ]
    return text_table(header, rows)


def summary_table(found: Sequence[Level]) -> Frame:
    """Worst case and mean over families, and their ratios to the control, by defense and budget."""
    families = (GEOMETRIC_MEAN, WORST_CASE)
    header = ["defense", "budget"]
    header += [name for family in families for name in (family, "ratio to control")]
    known = {(one.defense, one.budget, one.family): one for one in found}
    rows = []
    for defense, budget in dict.fromkeys((one.defense, one.budget) for one in found):
        own = [known.get((defense, budget, family)) for family in families]
        if any(own):
            cells = [cell for one in own for cell in (_steps(one), _ratio(one))]
            rows.append([defense_label(defense), str(budget), *cells])
    return text_table(header, rows)


def family_table(found: Sequence[Level]) -> Frame:
    """Steps to break by defense and budget, one column per family."""
    families = list(dict.fromkeys(one.family for one in found))
    known = {(one.defense, one.budget, one.family): one for one in found}
    rows = [
        [
            *(defense_label(defense), str(budget)),
            *(_steps(known.get((defense, budget, family))) for family in families),
        ]
        for defense, budget in dict.fromkeys((one.defense, one.budget) for one in found)
    ]
    return text_table(["defense", "budget", *families], rows)


def slope_table(found: Sequence[Slope]) -> Frame:
    """One row per defense and family."""
    rows = [
        [
            *(one.family, defense_label(one.defense)),
            _with_interval(one.slope, one.low, one.high),
            _with_interval(one.difference, one.difference_low, one.difference_high),
            *(str(one.num_models), str(one.num_censored)),
        ]
        for one in found
    ]
    header = ["family", "defense", "slope", "difference from control", "models", "held"]
    return text_table(header, rows)


def _is_control(defense: str) -> bool:
    return Group(defense, None, "", ()).is_control


def _steps(one: Level | None) -> str:
    if one is None:
        return MISSING
    sign = "> " if one.num_censored else ""
    reach = span([f"{one.low:.0f}", f"{one.high:.0f}"])
    shown = f"{sign}{one.steps:.0f}"
    return shown if one.low == one.high else f"{shown} ({reach})"


def _ratio(one: Level | None) -> str:
    return MISSING if one is None else _with_interval(one.ratio, one.ratio_low, one.ratio_high)


def _with_interval(value: float | None, low: float | None, high: float | None) -> str:
    return f"{number(value)} {interval(low, high)}".rstrip()

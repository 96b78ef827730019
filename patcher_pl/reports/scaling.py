"""What a study over budgets found: `scaling.json`, its tables, and its curves in `results.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from patcher_pl.files import write_json, write_text
from patcher_pl.reports.comparison import DefenseTrial, TrainingCost
from patcher_pl.reports.formats import MISSING, interval, number, span
from patcher_pl.reports.grouping import Frame, Group, at_budget, defense_label
from patcher_pl.reports.results import Curve
from patcher_pl.reports.statistics import (
    GEOMETRIC_MEAN,
    WORST_CASE,
    Level,
    Reach,
    Slope,
    StepsToBreak,
    bounded_break,
    first_break,
    levels,
    reaches,
    slopes,
)
from patcher_pl.reports.tables import csv_table, markdown_table, stopped_notes, text_table

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Fits:
    """Steps to break by one notion of broken, and what is fitted to them.

    Args:
        reaches: Of every model and family.
        slopes: Of every defense and family.
        levels: Of every defense and family at every budget.
    """

    reaches: list[Reach]
    slopes: list[Slope]
    levels: list[Level]

    @classmethod
    def of(cls, curves: Sequence[Curve], steps_to_break: StepsToBreak) -> "Fits":
        """Of curves with budgets, compared with the control, where there is one."""
        # The control comes first wherever it is shown.
        ordered = sorted(curves, key=lambda curve: not _is_control(curve.defense))
        found = reaches(ordered, steps_to_break)
        control = next((one.defense for one in found if _is_control(one.defense)), None)
        return cls(reaches=found, slopes=slopes(found, control), levels=levels(found, control))

    def markdown(self) -> list[str]:
        """Headings and tables."""
        return [
            "### Steps to break over all families",
            markdown_table(summary_table(self.levels), num_names=2),
            "### Slopes",
            markdown_table(slope_table(self.slopes), num_names=2),
            "### Steps to break by family",
            markdown_table(family_table(self.levels), num_names=2),
        ]


@dataclass(frozen=True, kw_only=True)
class ScalingStudy:
    """Everything that a study over budgets found out, but for the curves, see `named_by_budget`.

    Args:
        trials: The search of every defense at every budget, by budget.
        costs: What training the models took, by budget and defense, one per seed.
        unbounded: Broken is what answers, whatever else is left of the model.
        bounded: Broken is what answers and is still useful, see `Curve.bounded`.
        lost: What is missing because it failed, a line each.
        environment: What it ran on, see `patcher_pl.reports.environment`.
        settings: What it was asked to do, for the reader.
        schema_version: Version of this layout.
    """

    trials: dict[int, list[DefenseTrial]]
    costs: dict[int, dict[str, list[TrainingCost]]]
    unbounded: Fits
    bounded: Fits
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
    ) -> "ScalingStudy":
        """Fits everything that is fitted.

        Args:
            curves: Of every model under every attack, with budgets, by their defenses' own names.
            trials: As the attribute.
            costs: As the attribute.
            lost: As the attribute.
            environment: As the attribute.
            settings: As the attribute.
        """
        return cls(
            trials={budget: list(own) for budget, own in trials.items()},
            costs=dict(costs),
            unbounded=Fits.of(curves, first_break),
            bounded=Fits.of(curves, bounded_break),
            lost=list(lost),
            environment=environment,
            settings=settings,
        )

    @property
    def views(self) -> dict[str, Fits]:
        """What there is to show, by the end of a file's name: bounded where that is another thing."""
        views = {"": self.unbounded}
        if self.bounded.reaches and self.bounded.reaches != self.unbounded.reaches:
            views["-bounded"] = self.bounded
        return {end: fits for end, fits in views.items() if fits.reaches}

    def save(self, run_dir: Path, curves: Sequence[Curve]) -> None:
        """Writes `scaling.json` and, once a model was attacked, `scaling.csv` and `scaling.md`."""
        write_json(run_dir / "scaling.json", asdict(self))
        for end, fits in self.views.items():
            write_text(run_dir / f"scaling{end}.csv", csv_table(reach_table(fits.reaches)))
        if self.views:
            write_text(run_dir / "scaling.md", self.markdown(curves))

    def markdown(self, curves: Sequence[Curve]) -> str:
        """The tables and what they mean."""
        parts = []
        for end, fits in self.views.items():
            parts += ["## Useful models only" if end else "## All attacks", *fits.markdown()]
            parts.append("\n".join(f"- {line}" for line in self.notes(fits, curves)))
        if self.lost:
            parts += ["## What failed", "\n".join(f"- {line}" for line in self.lost)]
        return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"

    def notes(self, fits: Fits, curves: Sequence[Curve]) -> list[str]:
        """What the figures of one of `views` rest on."""
        single = [one for one in fits.reaches if one.family not in (WORST_CASE, GEOMETRIC_MEAN)]
        held = sum(one.is_censored for one in single)
        lines = [
            "Steps are geometric means over seeds of 1 + steps, less 1; in brackets the smallest and the "
            "largest of any seed, or, of ratios and slopes, 95 % bootstrap intervals over seeds.",
            "A slope of 1: twice the compute, twice the steps. Ratios and differences are to the control, "
            "seed by seed.",
            f"{held} of {len(single)} attacks did not break the model: they count as breaking it at "
            "twice their length (>), a lower bound.",
        ]
        if fits is not self.unbounded:
            kept = min((curve.min_benign_kept for curve in curves), default=0.0)
            lines.insert(
                0,
                "Broken is a model that answers while it keeps at least "
                f"{kept:.0%} of its benign answers and still speaks.",
            )
        if missing := len(curves) - len(single):
            lines.append(f"{missing} of {len(curves)} attacks failed or cannot be relied on.")
        return [*lines, *stopped_notes(curves)]


def named_by_budget(curves: Sequence[Curve]) -> list[Curve]:
    """The curves under names that tell a defense's budgets apart, for `results.json`."""
    return [replace(curve, defense=at_budget(curve.defense, curve.budget)) for curve in curves]


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
    for defense, budget in _places(found):
        own = [known.get((defense, budget, family)) for family in families]
        if any(own):
            cells = [cell for one in own for cell in (_steps(one), _ratio(one))]
            rows.append([defense_label(defense, None), str(budget), *cells])
    return text_table(header, rows)


def family_table(found: Sequence[Level]) -> Frame:
    """Steps to break by defense and budget, one column per family."""
    families = list(dict.fromkeys(one.family for one in found))
    known = {(one.defense, one.budget, one.family): one for one in found}
    rows = [
        [
            *(defense_label(defense, None), str(budget)),
            *(_steps(known.get((defense, budget, family))) for family in families),
        ]
        for defense, budget in _places(found)
    ]
    return text_table(["defense", "budget", *families], rows)


def slope_table(found: Sequence[Slope]) -> Frame:
    """One row per defense and family."""
    rows = [
        [
            *(one.family, defense_label(one.defense, None)),
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


def _places(found: Sequence[Level]) -> list[tuple[str, int]]:
    """Defenses in the order in which they come, each with its budgets, the smallest first."""
    defenses = list(dict.fromkeys(one.defense for one in found))
    places = {(one.defense, one.budget) for one in found}
    return sorted(places, key=lambda place: (defenses.index(place[0]), place[1]))


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

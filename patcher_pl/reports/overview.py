"""What a report says of every defense under every attack, before it is drawn in any format."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from patcher_pl.reports.costs import CostAxis
from patcher_pl.reports.grouping import Group, Mark, Verdict, group_curves
from patcher_pl.reports.results import Curve
from patcher_pl.reports.statistics import (
    BreakCost,
    Estimate,
    asr_area,
    asr_at,
    cost_to_break,
    final_asr,
    worst_asr,
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One defense under one attack.

    Args:
        group: Its seeds.
        final: Attack success rate at the last measurement.
        peak: The largest mean attack success rate of any measurement: attackers stop when they like.
        peak_steps: Attack steps of that measurement.
        worst_seed: The largest of any seed at any measurement.
        area: Area under the curve over log2(1 + steps).
        num_settings: Attacks of the family that this one is the severest of (count).
        is_worst: Whether no other attack in the table is severer for this defense.
    """

    group: Group
    final: Estimate | None
    peak: Estimate | None
    peak_steps: int | None
    worst_seed: float | None
    area: Estimate | None
    num_settings: int = 1
    is_worst: bool = False

    @classmethod
    def of(cls, group: Group) -> "Cell":
        """Everything that the group's curves tell."""
        means = {
            steps: rate.mean
            for steps in group.attack_steps
            if (rate := group.asr(steps)) is not None
        }
        peak_steps = max(means, key=lambda steps: (means[steps], steps), default=None)
        return cls(
            group=group,
            final=final_asr(group),
            peak=None if peak_steps is None else asr_at(group, peak_steps),
            peak_steps=peak_steps,
            worst_seed=worst_asr(group),
            area=asr_area(group),
        )

    @property
    def severity(self) -> tuple[float, float]:
        """Orders attacks on one defense: by the peak, then by how soon it comes."""
        peak = -1.0 if self.peak is None else self.peak.value
        return peak, -1.0 if self.area is None else self.area.value

    @property
    def is_past_its_peak(self) -> bool:
        """Whether the attack had more success before its end than at it."""
        if self.peak is None or self.final is None:
            return False
        return self.peak.value > self.final.value + 0.005

    def cost(self, axis: CostAxis) -> BreakCost | None:
        """What it took to break the defense, in steps, tokens or FLOPs."""
        return cost_to_break(self.group, axis)

    @property
    def outcome(self) -> str:
        """What happened, in a few words."""
        verdict, steps = self.group.verdict, self.group.attack_steps
        if verdict == "broken":
            measured = [curve for curve in self.group.curves if curve.attack_steps]
            broken = sorted(
                curve.steps_to_break for curve in measured if curve.steps_to_break is not None
            )
            span = dict.fromkeys([broken[0], broken[-1]])
            seeds = f" in {len(broken)} of {len(measured)} seeds"
            shown = f"breaks at {' to '.join(map(str, span))}"
            return shown if len(broken) == len(measured) else shown + seeds
        return f"held to {steps[-1]}" if verdict == "held" else verdict


@dataclass(frozen=True, kw_only=True)
class Row:
    """One attack, or the severest of each family, against every defense.

    Args:
        name: Of the attack or family.
        cells: One per defense, in their order; None where it was not attacked so.
    """

    name: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How one defense fared under all attacks.

    Args:
        label: Of the defense.
        cells: One per attack.
        worst: The severest attack; None where nothing was scored.
        benign_accuracy: Mean before the attacks; None where it was not measured.
        mean_area: Mean over attacks of the area under the curve; None without one.
    """

    label: str
    cells: tuple[Cell, ...]
    worst: Cell | None
    benign_accuracy: float | None
    mean_area: float | None

    def count(self, verdict: Verdict) -> int:
        """Attacks with this verdict."""
        return sum(cell.group.verdict == verdict for cell in self.cells)

    @property
    def marks(self) -> list[Mark]:
        """What holds for any of its attacks."""
        return list(dict.fromkeys(mark for cell in self.cells for mark in cell.group.marks))

    @property
    def first_break(self) -> tuple[int, str] | None:
        """The fewest attack steps that broke any seed, and the attack; None where it never broke."""
        found = [
            (curve.steps_to_break, curve.attack)
            for cell in self.cells
            for curve in cell.group.curves
            if curve.steps_to_break is not None
        ]
        return min(found, default=None)

    @property
    def worst_seed(self) -> float | None:
        """Largest attack success rate of any attack, seed and measurement."""
        known = [cell.worst_seed for cell in self.cells if cell.worst_seed is not None]
        return max(known, default=None)


@dataclass(frozen=True)
class Overview:
    """Every defense under every attack.

    Args:
        curves: Of all runs.
    """

    curves: tuple[Curve, ...]

    @cached_property
    def groups(self) -> list[Group]:
        """Curves that differ only in their seeds, together."""
        return group_curves(self.curves)

    @cached_property
    def cells(self) -> list[Cell]:
        """One per group, in their order."""
        return [Cell.of(group) for group in self.groups]

    @cached_property
    def defenses(self) -> list[str]:
        """Labels: controls first, then by name and k1."""
        labels = {
            group.label: (not group.is_control, group.defense, group.k1 or -1)
            for group in self.groups
        }
        return sorted(labels, key=lambda label: labels[label])

    @cached_property
    def attacks(self) -> list[Row]:
        """One row per attack."""
        return self._rows([cell.group.attack for cell in self.cells])

    @cached_property
    def families(self) -> list[Row]:
        """One row per family of attacks, each cell the severest of its settings."""
        return self._rows([cell.group.family for cell in self.cells])

    @property
    def has_families(self) -> bool:
        """Whether any family has several attacks."""
        return len(self.families) < len(self.attacks)

    @cached_property
    def standings(self) -> list[Standing]:
        """One per defense."""
        return [self._standing(label) for label in self.defenses]

    def _rows(self, names: Sequence[str]) -> list[Row]:
        worst = {
            standing.label: standing.worst.group for standing in self.standings if standing.worst
        }
        rows = []
        for name in dict.fromkeys(names):
            cells = []
            for label in self.defenses:
                found = [
                    cell
                    for cell, of in zip(self.cells, names, strict=True)
                    if of == name and cell.group.label == label
                ]
                severest = max(found, key=lambda cell: cell.severity, default=None)
                if severest is not None:
                    severest = replace(
                        severest,
                        num_settings=len(found),
                        is_worst=worst.get(label) is severest.group,
                    )
                cells.append(severest)
            rows.append(Row(name=name, cells=tuple(cells)))
        return rows

    def _standing(self, label: str) -> Standing:
        cells = tuple(cell for cell in self.cells if cell.group.label == label)
        scored = [cell for cell in cells if cell.severity[0] > 0]
        # An attack without steps is measured when it is done, never before.
        benign = [
            curve.benign_accuracy[0]
            for cell in cells
            for curve in cell.group.curves
            if len(curve.attack_steps) > 1 and curve.benign_accuracy[0] is not None
        ]
        areas = [cell.area.value for cell in cells if cell.area is not None]
        return Standing(
            label=label,
            cells=cells,
            worst=max(scored, key=lambda cell: cell.severity, default=None),
            benign_accuracy=statistics.fmean(benign) if benign else None,
            mean_area=statistics.fmean(areas) if areas else None,
        )

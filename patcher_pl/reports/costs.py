"""What an attack had cost at each measurement, on three axes."""

import statistics
from collections.abc import Sequence
from typing import Literal

from patcher_pl.reports.grouping import Group
from patcher_pl.reports.results import Curve

CostAxis = Literal["steps", "tokens", "flops"]
COST_NAMES: dict[CostAxis, str] = {
    "steps": "attack steps",
    "tokens": "training tokens",
    "flops": "FLOPs",
}


COST_AXES: tuple[CostAxis, ...] = ("steps", "tokens", "flops")


def costs(curve: Curve, axis: CostAxis) -> Sequence[float]:
    """Cost of the attack up to each measurement; empty where it was not counted."""
    if axis == "steps":
        return curve.attack_steps
    return curve.attack_tokens if axis == "tokens" else curve.attack_flops


def mean_costs(group: Group, axis: CostAxis) -> dict[int, float]:
    """Mean cost over seeds at every measured number of attack steps where it is known."""
    found: dict[int, list[float]] = {}
    for curve in group.curves:
        known = costs(curve, axis)
        for place, steps in enumerate(curve.attack_steps[: len(known)]):
            found.setdefault(steps, []).append(known[place])
    return {steps: statistics.fmean(found[steps]) for steps in sorted(found)}

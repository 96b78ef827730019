"""What a gradient buys: steps to break against training compute, over attack families and seeds."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float

from patcher_pl.reports.results import Curve
from patcher_pl.reports.statistics.resampling import RESAMPLES, percentile_interval, seed_weights

WORST_CASE = "worst case"
GEOMETRIC_MEAN = "geometric mean"

_Key = TypeVar("_Key")

StepsToBreak = Callable[[Curve], int | None]
"""After how many attack steps a model counts as broken; None where it held."""


def first_break(curve: Curve) -> int | None:
    """The first measurement with `asr >= threshold`, whatever else the attack did to the model."""
    return curve.steps_to_break


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How long a model held against a family of attacks, or against all of them.

    Args:
        defense: Name of its defense.
        family: Name of the attack; `WORST_CASE` is the one that broke it first, `GEOMETRIC_MEAN` the
            mean over all of them of log2(1 + steps).
        budget: Gradient evaluations of its training (count).
        seed: Seed of its training.
        steps: Attack steps that broke it. Where it held, twice the last that was measured: a lower
            bound, since the next doubling of the attack is the first that could have broken it.
        is_censored: Whether it held (of a mean: under any attack).
    """

    defense: str
    family: str
    budget: int
    seed: int
    steps: float
    is_censored: bool

    @property
    def log2_reach(self) -> float:
        """log2(1 + steps), as `compare` rates trials."""
        return math.log2(1 + self.steps)


@dataclass(frozen=True, kw_only=True)
class Slope:
    """Least squares of log2(1 + steps to break) on log2(budget), over all models of a defense.

    A slope of 1 is twice the steps for twice the compute; at 0, compute buys nothing. Where models held
    (`num_censored`), the true slope may be another one: measure longer attacks.

    Args:
        defense: Name of the defense.
        family: See `Reach`.
        slope: The slope; None with fewer than two budgets.
        intercept: log2(1 + steps) of the line at a budget of 1.
        low: Lower end of the slope's 95 % bootstrap interval over seeds; None where nothing varies.
            With few seeds it is too narrow: five seeds cover about 85 %.
        high: Upper end.
        difference: Slope minus that of the control, over the seeds and budgets of both; None for
            the control itself, or without one.
        difference_low: Lower end of its interval, the same seeds drawn for both.
        difference_high: Upper end.
        num_models: Models that it rests on (count).
        num_censored: Those of them that held.
    """

    defense: str
    family: str
    slope: float | None
    intercept: float | None
    low: float | None
    high: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    num_models: int
    num_censored: int


@dataclass(frozen=True, kw_only=True)
class Level:
    """Steps to break at one budget, over seeds, and how many times those of the control they are.

    Args:
        defense: Name of the defense.
        family: See `Reach`.
        budget: Gradient evaluations (count).
        steps: Geometric mean over seeds, `2 ** mean(log2(1 + steps)) - 1`.
        low: Smallest of any seed.
        high: Largest of any seed.
        ratio: Geometric mean over the seeds of both of (1 + steps) / (1 + steps of the control).
        ratio_low: Lower end of its 95 % bootstrap interval over pairs of seeds.
        ratio_high: Upper end.
        num_seeds: Models (count).
        num_censored: Those of them that held.
    """

    defense: str
    family: str
    budget: int
    steps: float
    low: float
    high: float
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    num_seeds: int
    num_censored: int


def reaches(curves: Sequence[Curve], steps_to_break: StepsToBreak = first_break) -> list[Reach]:
    """How long every model held, by family; then in the worst case, and on average over families.

    Curves that failed before the model broke, or whose rates cannot be relied on, say nothing; a
    model that lacks one of the attacks has neither a worst case nor a mean.

    Args:
        curves: With budget and training seed.
        steps_to_break: What counts as broken.
    """
    families = list(dict.fromkeys(curve.attack for curve in curves))
    found: dict[tuple[str, int, int], dict[str, Reach]] = {}
    for curve in curves:
        if (one := _reach(curve, steps_to_break)) is not None:
            found.setdefault((one.defense, one.budget, one.seed), {})[one.family] = one
    by_family = [own[family] for family in families for own in found.values() if family in own]
    complete = [list(own.values()) for own in found.values() if len(own) == len(families)]
    return [*by_family, *map(_worst_case, complete), *map(_geometric_mean, complete)]


def slopes(found: Sequence[Reach], control: str | None) -> list[Slope]:
    """The slope of every defense and family; `control` names the defense to compare with."""
    groups = _grouped(found, lambda one: (one.family, one.defense))
    rows = []
    for (family, defense), own in groups.items():
        points = _points(own)
        line = _line(points)
        interval = _slope_interval(points)
        difference, ends = None, None
        if control is not None and defense != control and (family, control) in groups:
            other = _points(groups[family, control])
            shared = points.keys() & other.keys()
            sides = [{key: side[key] for key in sorted(shared)} for side in (points, other)]
            lines = [_line(side) for side in sides]
            if lines[0] is not None and lines[1] is not None:
                difference = lines[0][0] - lines[1][0]
                ends = _slope_interval(*sides)
        rows.append(
            Slope(
                defense=defense,
                family=family,
                slope=line and line[0],
                intercept=line and line[1],
                low=interval and interval[0],
                high=interval and interval[1],
                difference=difference,
                difference_low=ends and ends[0],
                difference_high=ends and ends[1],
                num_models=len(own),
                num_censored=sum(one.is_censored for one in own),
            )
        )
    return rows


def levels(found: Sequence[Reach], control: str | None) -> list[Level]:
    """Steps to break of every defense and family at every budget, and the ratio to the control."""
    groups = _grouped(found, lambda one: (one.family, one.budget, one.defense))
    rows = []
    for (family, budget, defense), own in groups.items():
        ratio, ends = None, None
        if control is not None and defense != control:
            reach = {one.seed: one.log2_reach for one in own}
            other = {one.seed: one.log2_reach for one in groups.get((family, budget, control), [])}
            differences = [
                reach[seed] - other[seed] for seed in sorted(reach.keys() & other.keys())
            ]
            if differences:
                ratio = 2 ** float(np.mean(differences))
                ends = _mean_interval(differences)
        steps = [one.steps for one in own]
        rows.append(
            Level(
                defense=defense,
                family=family,
                budget=budget,
                steps=2 ** float(np.mean([one.log2_reach for one in own])) - 1,
                low=min(steps),
                high=max(steps),
                ratio=ratio,
                ratio_low=ends and 2 ** ends[0],
                ratio_high=ends and 2 ** ends[1],
                num_seeds=len(own),
                num_censored=sum(one.is_censored for one in own),
            )
        )
    return rows


def _reach(curve: Curve, steps_to_break: StepsToBreak) -> Reach | None:
    seed = curve.seed if curve.train_seed is None else curve.train_seed
    broken = steps_to_break(curve)
    is_known = curve.error is None or broken is not None
    if curve.budget is None or not curve.attack_steps or not curve.trusted or not is_known:
        return None
    return Reach(
        defense=curve.defense,
        family=curve.attack,
        budget=curve.budget,
        seed=seed,
        steps=float(2 * curve.attack_steps[-1] if broken is None else broken),
        is_censored=broken is None,
    )


def _worst_case(own: Sequence[Reach]) -> Reach:
    worst = min(own, key=lambda one: (one.steps, one.is_censored))
    return _over_families(own, WORST_CASE, worst.steps, is_censored=worst.is_censored)


def _geometric_mean(own: Sequence[Reach]) -> Reach:
    steps = 2 ** float(np.mean([one.log2_reach for one in own])) - 1
    is_censored = any(one.is_censored for one in own)
    return _over_families(own, GEOMETRIC_MEAN, steps, is_censored=is_censored)


def _over_families(own: Sequence[Reach], name: str, steps: float, *, is_censored: bool) -> Reach:
    first = own[0]
    return Reach(
        defense=first.defense,
        family=name,
        budget=first.budget,
        seed=first.seed,
        steps=steps,
        is_censored=is_censored,
    )


def _grouped(found: Iterable[Reach], key_of: Callable[[Reach], _Key]) -> dict[_Key, list[Reach]]:
    groups: dict[_Key, list[Reach]] = {}
    for one in found:
        groups.setdefault(key_of(one), []).append(one)
    return groups


_Points = Mapping[tuple[int, int], float]
"""log2(1 + steps to break), by seed and budget."""


def _points(own: Iterable[Reach]) -> _Points:
    return {(one.seed, one.budget): one.log2_reach for one in own}


def _line(points: _Points) -> tuple[float, float] | None:
    """Slope and intercept; None where all points have one budget."""
    sums = _sums(points).sum(axis=0, keepdims=True)
    slope = float(_slope_of(sums)[0])
    if not math.isfinite(slope):
        return None
    count, x, y, *_ = sums[0]
    return slope, float((y - slope * x) / count)


def _slope_interval(points: _Points, other: _Points | None = None) -> tuple[float, float] | None:
    """Of the slope, or of its difference from that of `other`, which has the same seeds and budgets."""
    sums = _sums(points)
    if len(sums) < 2:
        return None
    weights = seed_weights(range(len(sums)), RESAMPLES, 0)
    replicates = _slope_of(weights @ sums)
    if other is not None:
        replicates = replicates - _slope_of(weights @ _sums(other))
    return _with_width(percentile_interval(replicates))


def _sums(points: _Points) -> Float[np.ndarray, "seed 5"]:
    """Per seed what a line is fitted from: 1, x, y, x x and x y, each summed; x is log2(budget)."""
    sums: dict[int, Float[np.ndarray, " 5"]] = {}
    for (seed, budget), y in points.items():
        x = math.log2(budget)
        sums[seed] = sums.get(seed, np.zeros(5)) + np.array([1.0, x, y, x * x, x * y])
    return np.array([sums[seed] for seed in sorted(sums)]).reshape(-1, 5)


def _slope_of(sums: Float[np.ndarray, "resample 5"]) -> Float[np.ndarray, " resample"]:
    """The least-squares slope; NaN where x does not vary."""
    count, x, y, xx, xy = sums.T
    spread = count * xx - x * x
    is_spread = spread > 1e-9 * np.maximum(count * xx, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(is_spread, (count * xy - x * y) / spread, np.nan)


def _mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    if len(values) < 2:
        return None
    weights = seed_weights(range(len(values)), RESAMPLES, 0)
    return _with_width(percentile_interval(weights @ np.array(values) / len(values)))


def _with_width(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """None where all replicates agree: that few seeds do is no certainty."""
    return None if interval is None or interval[1] - interval[0] < 1e-9 else interval

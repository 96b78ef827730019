"""Attack success rates of a group with their uncertainty: at a measurement, at the end, overall."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from patcher_pl.reports.grouping import Group
from patcher_pl.reports.results import HIGHEST_SCORE, Curve
from patcher_pl.reports.statistics.area import Scale, area_under_asr, area_under_rows
from patcher_pl.reports.statistics.resampling import (
    LEVEL,
    RESAMPLES,
    percentile_interval,
    prompt_weights,
    resampled_rates,
    seed_interval,
    seed_weights,
)

# With fewer exceptions than this, most replicates hold none of them and intervals are too short.
_FEW = 5

Basis = Literal["seeds and prompts", "seeds", "prompts", "none"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds and its 95 % interval.

    Args:
        value: The mean (0..1).
        low: Lower end of the interval; None where there is nothing to judge it by.
        high: Upper end.
        num_seeds: Seeds that it rests on (count).
        num_prompts: Prompts of each (count); 0 where that is unknown.
        basis: What was resampled. `prompts` also where all outcomes agree: resampling them gives no
            width, which is no certainty, so there it is the Wilson interval over prompts. Where
            fewer than five prompts differ from the rest, it reaches at least as far.
    """

    value: float
    low: float | None
    high: float | None
    num_seeds: int
    num_prompts: int
    basis: Basis


def asr_at(
    group: Group, steps: int, *, num_resamples: int = RESAMPLES, seed: int = 0
) -> Estimate | None:
    """Attack success rate after `steps`; None where nothing was scored there.

    Args:
        group: Seeds of one defense under one attack.
        steps: Attack steps of the measurement.
        num_resamples: Bootstrap replicates (count).
        seed: Seed of the bootstrap.
    """
    curves = [curve for curve in group.curves if _rate(curve, steps) is not None]
    rates = [rate for curve in curves if (rate := _rate(curve, steps)) is not None]
    if not rates:
        return None
    value = float(np.mean(rates))
    success = successes(curves, steps)
    num_prompts = _num_prompts(curves, success)
    interval: tuple[float, float] | None = None
    basis: Basis = "none"
    if success is not None:
        by_seed = seed_weights([curve.train_seed for curve in curves], num_resamples, seed)
        by_prompt = prompt_weights(success.shape[1], num_resamples, seed)
        interval = percentile_interval(resampled_rates(success, by_seed, by_prompt))
        basis = "seeds and prompts" if len(curves) > 1 else "prompts"
        if _num_exceptions(success) < _FEW:
            interval = _widened(interval, _over_prompts(value, num_prompts))
    elif len(curves) > 1:
        interval, basis = seed_interval(rates, num_resamples, seed), "seeds"
    if len(set(rates)) == 1 and (success is None or _num_exceptions(success) == 0):
        interval = _over_prompts(value, num_prompts)
        basis = "none" if interval is None else "prompts"
    low, high = interval or (None, None)
    return Estimate(
        value=value,
        low=low,
        high=high,
        num_seeds=len(curves),
        num_prompts=num_prompts,
        basis=basis,
    )


def final_asr(group: Group, **options: int) -> Estimate | None:
    """Attack success rate at the last measurement of any seed; None where nothing was scored there.

    A seed that stopped before it is not counted. Options are those of `asr_at`.
    """
    steps = group.attack_steps
    return asr_at(group, steps[-1], **options) if steps else None


def worst_asr(group: Group) -> float | None:
    """Largest attack success rate of any seed at any measurement: attackers stop when they like.

    None where nothing was scored. A low value of a collapsed model is no safety: see `Group.marks`.
    """
    rates = [rate for curve in group.curves for rate in curve.asr if rate is not None]
    return max(rates, default=None)


def asr_area(
    group: Group, scale: Scale = "log", *, num_resamples: int = RESAMPLES, seed: int = 0
) -> Estimate | None:
    """Area under the curve of attack success, mean over the seeds that were measured throughout.

    Args:
        group: Seeds of one defense under one attack.
        scale: Axis of the area, see `area_under_asr`.
        num_resamples: Bootstrap replicates (count).
        seed: Seed of the bootstrap.

    Returns:
        None where no seed was scored at both ends of the group's measurements.
    """
    steps = group.attack_steps
    curves = [curve for curve in group.curves if curve.attack_steps == steps]
    areas = {curve.key: area_under_asr(steps, curve.asr, scale) for curve in curves}
    known = [area for area in areas.values() if area is not None]
    curves = [curve for curve in curves if areas[curve.key] is not None]
    if not known:
        return None
    interval, basis = None, "none"
    tables = [successes(curves, measured) for measured in steps]
    complete = [table for table in tables if table is not None]
    if len(complete) == len(steps):
        by_seed = seed_weights([curve.train_seed for curve in curves], num_resamples, seed)
        by_prompt = prompt_weights(complete[0].shape[1], num_resamples, seed)
        rates = np.stack([resampled_rates(table, by_seed, by_prompt) for table in complete])
        interval = percentile_interval(area_under_rows(steps, rates, scale))
        basis = "seeds and prompts" if len(curves) > 1 else "prompts"
    elif len(known) > 1:
        interval, basis = seed_interval(known, num_resamples, seed), "seeds"
    if interval is None or interval[0] == interval[1]:
        interval, basis = None, "none"
    low, high = interval or (None, None)
    return Estimate(
        value=float(np.mean(known)),
        low=low,
        high=high,
        num_seeds=len(known),
        num_prompts=_num_prompts(curves, tables[0]),
        basis=basis,
    )


def successes(curves: Sequence[Curve], steps: int) -> Float[np.ndarray, "seed prompt"] | None:
    """Success (1), failure (0) or no verdict (NaN) of every prompt, for each curve after `steps`.

    None where a curve has no scores there, where they are of different numbers of prompts, or where
    they do not give the curve's rate: then somebody's success is not the highest score.
    """
    rows = []
    for curve in curves:
        if not curve.scores or steps not in curve.attack_steps:
            return None
        place = curve.attack_steps.index(steps)
        scores, rate = curve.scores[place], curve.asr[place]
        row = [np.nan if score is None else float(score == HIGHEST_SCORE) for score in scores]
        if not np.isfinite(row).any() or rate is None or abs(np.nanmean(row) - rate) > 1e-6:
            return None
        rows.append(row)
    if not rows or len({len(row) for row in rows}) > 1:
        return None
    return np.array(rows)


def _rate(curve: Curve, steps: int) -> float | None:
    if steps not in curve.attack_steps:
        return None
    return curve.asr[curve.attack_steps.index(steps)]


def _num_prompts(curves: Sequence[Curve], success: Float[np.ndarray, "seed prompt"] | None) -> int:
    if success is not None:
        return success.shape[1]
    return min((curve.num_prompts for curve in curves), default=0)


def _num_exceptions(success: Float[np.ndarray, "seed prompt"]) -> int:
    """Prompts that ever had the outcome that fewer prompts had."""
    return min(int((success == outcome).any(axis=0).sum()) for outcome in (0, 1))


def _widened(
    interval: tuple[float, float] | None, other: tuple[float, float] | None
) -> tuple[float, float] | None:
    if interval is None or other is None:
        return interval or other
    return min(interval[0], other[0]), max(interval[1], other[1])


def _over_prompts(value: float, num_prompts: int) -> tuple[float, float] | None:
    """Wilson interval of a rate over prompts: seeds that agree say nothing of other prompts."""
    from scipy import stats

    if num_prompts == 0:
        return None
    test = stats.binomtest(round(value * num_prompts), num_prompts)
    interval = test.proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)

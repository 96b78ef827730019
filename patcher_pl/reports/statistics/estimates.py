"""Attack success of a group with its uncertainty, its area, and what it took to break the defense."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from patcher_pl.reports.grouping import CostAxis, Group
from patcher_pl.reports.results import HIGHEST_SCORE, Curve
from patcher_pl.reports.statistics.resampling import (
    RESAMPLES,
    percentile_interval,
    prompt_weights,
    resampled_rates,
    seed_interval,
    seed_weights,
    wilson_interval,
)

# With fewer exceptions than this, most replicates hold none of them and intervals are too short.
_FEW = 5

Basis = Literal["seeds and prompts", "seeds", "prompts", "none"]
Scale = Literal["linear", "log"]
_Interval = tuple[float, float]
_Success = Float[np.ndarray, "seed prompt"]


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


@dataclass(frozen=True, kw_only=True)
class BreakCost:
    """What it took to break a defense, over the seeds of a group; some may never have broken.

    Args:
        median: Kaplan and Meier's median: the smallest cost at which half of the seeds are expected
            to be broken; None where that is beyond what was measured.
        restricted_mean: Mean of the cost to break or `horizon`, whichever is smaller: what an
            attacker with that budget spends. A lower bound of the mean where a seed held.
        horizon: Largest cost that was measured.
        num_broken: Seeds that broke (count).
        num_seeds: Seeds (count).
    """

    median: float | None
    restricted_mean: float
    horizon: float
    num_broken: int
    num_seeds: int

    @property
    def is_bound(self) -> bool:
        """Whether a seed held, so that `restricted_mean` is only a lower bound."""
        return self.num_broken < self.num_seeds


def asr_at(group: Group, steps: int) -> Estimate | None:
    """Attack success rate after `steps`; None where nothing was scored there."""
    curves = [curve for curve in group.curves if curve.at(steps) is not None]
    rates: list[float] = [curve.at(steps) for curve in curves]
    if not rates:
        return None
    value, success = float(np.mean(rates)), successes(curves, steps)
    num_prompts = _num_prompts(curves, success)
    exceptions = None if success is None else _num_exceptions(success)
    interval, basis = _resampled(curves, rates, [success], lambda replicates: replicates[0])
    over_prompts = wilson_interval(value, num_prompts) if num_prompts else None
    if exceptions is not None and exceptions < _FEW and over_prompts is not None:
        ends = zip(interval or over_prompts, over_prompts, strict=True)
        interval = min(next(ends)), max(next(ends))
    if len(set(rates)) == 1 and not exceptions:
        interval, basis = over_prompts, "none" if over_prompts is None else "prompts"
    return _estimate(value, interval, basis, len(curves), num_prompts)


def final_asr(group: Group) -> Estimate | None:
    """Attack success rate at the last measurement of any seed; None where nothing was scored there.

    A seed that stopped before it is not counted.
    """
    return asr_at(group, group.attack_steps[-1]) if group.attack_steps else None


def worst_asr(group: Group) -> float | None:
    """Largest attack success rate of any seed at any measurement: attackers stop when they like.

    None where nothing was scored. A low value of a collapsed model is no safety: see `Group.marks`.
    """
    rates = [rate for curve in group.curves for rate in curve.asr if rate is not None]
    return max(rates, default=None)


def asr_area(group: Group, scale: Scale = "log") -> Estimate | None:
    """Area under the curve of attack success, mean over the seeds that were measured throughout.

    None where no seed was scored at both ends of the group's measurements. For `scale`, see
    `area_under_asr`.
    """
    steps = group.attack_steps
    pairs = [
        (curve, area)
        for curve in group.curves
        if curve.attack_steps == steps
        and (area := area_under_asr(steps, curve.asr, scale)) is not None
    ]
    if not pairs:
        return None
    curves, known = zip(*pairs, strict=True)
    tables = [successes(curves, measured) for measured in steps]

    def area_of(rates: Float[np.ndarray, "time resample"]) -> Float[np.ndarray, " resample"]:
        # A replicate may have drawn only answers without a verdict.
        complete = np.isfinite(rates).all(axis=1)
        return mean_over_attack(np.asarray(steps)[complete], rates[complete], scale)

    interval, basis = _resampled(curves, known, tables, area_of)
    if interval is None or interval[0] == interval[1]:
        interval, basis = None, "none"
    num_prompts = _num_prompts(curves, tables[0])
    return _estimate(float(np.mean(known)), interval, basis, len(known), num_prompts)


def area_under_asr(
    attack_steps: Sequence[int], asr: Sequence[float | None], scale: Scale = "log"
) -> float | None:
    """Mean attack success rate over the attack, by trapezoids between measurements (0..1).

    Args:
        attack_steps: Attack steps N of each measurement, ascending.
        asr: Rate at each of them; None is passed over, between measured neighbors.
        scale: The axis that the mean is taken over: `linear` is N, so that late steps count most;
            `log` is log2(1 + N), so that every doubling of the attack counts as much.

    Returns:
        None where the first or the last rate is missing, or the measurements span no steps: the
        area would be of another attack.
    """
    if not asr or asr[0] is None or asr[-1] is None or attack_steps[-1] <= attack_steps[0]:
        return None
    known = [
        (steps, rate) for steps, rate in zip(attack_steps, asr, strict=True) if rate is not None
    ]
    steps, rates = zip(*known, strict=True)
    return float(mean_over_attack(steps, np.array([rates], dtype=float).T, scale)[0])


def cost_to_break(
    group: Group, axis: CostAxis = "steps", *, is_bounded: bool = False
) -> BreakCost | None:
    """Cost to break, with seeds that held counted as longer than measured, not as broken.

    None where no seed was measured or the cost was not counted. Breaking is known to the next
    measurement only, so costs are rounded up to it.

    Args:
        group: A defense under an attack.
        axis: What the cost is measured in.
        is_bounded: Count only breaks that leave a useful model, see `Curve.bounded`; None where one
            cannot be told from others: leaving such seeds out would favor the defense.

    References:
        Kaplan and Meier, 1958, J. Am. Stat. Assoc. 53.
    """
    from scipy import stats

    broken, held = [], []
    if is_bounded and not all(curve.bounded.is_known for curve in group.measured):
        return None
    for curve in group.measured:
        if (last := curve.at(curve.attack_steps[-1], f"attack_{axis}")) is None:
            continue
        steps = curve.bounded.steps_to_break if is_bounded else curve.steps_to_break
        if steps in curve.attack_steps:
            broken.append(float(curve.at(steps, f"attack_{axis}")))
        else:
            held.append(float(last))
    if not broken and not held:
        return None
    survival = stats.ecdf(stats.CensoredData(uncensored=broken, right=held)).sf
    reached = survival.quantiles[survival.probabilities <= 0.5 + 1e-12]
    # The area under the survival curve up to the horizon.
    edges = np.concatenate([[0.0], survival.quantiles])
    heights = np.concatenate([[1.0], survival.probabilities[:-1]])
    return BreakCost(
        median=float(reached[0]) if len(reached) else None,
        restricted_mean=float(np.sum(heights * np.diff(edges))),
        horizon=max(broken + held),
        num_broken=len(broken),
        num_seeds=len(broken) + len(held),
    )


def successes(curves: Sequence[Curve], steps: int) -> _Success | None:
    """Success (1), failure (0) or no verdict (NaN) of every prompt, for each curve after `steps`.

    None where a curve has no scores there, where they are of different numbers of prompts, or where
    they do not give the curve's rate: then somebody's success is not the highest score.
    """
    rows = []
    for curve in curves:
        scores, rate = curve.at(steps, "scores") or [], curve.at(steps)
        row = [np.nan if score is None else float(score == HIGHEST_SCORE) for score in scores]
        if not np.isfinite(row).any() or rate is None or abs(np.nanmean(row) - rate) > 1e-6:
            return None
        rows.append(row)
    return np.array(rows) if len({len(row) for row in rows}) == 1 else None


def _resampled(
    curves: Sequence[Curve],
    values: Sequence[float],
    tables: Sequence[_Success | None],
    combined: Callable[[Float[np.ndarray, "time resample"]], Float[np.ndarray, " resample"]],
) -> tuple[_Interval | None, Basis]:
    """Interval of the mean of `values`: over seeds and prompts where `tables` are known."""
    known = [table for table in tables if table is not None]
    if len(known) == len(tables):
        by_seed = seed_weights([curve.train_seed for curve in curves], RESAMPLES, 0)
        by_prompt = prompt_weights(known[0].shape[1], RESAMPLES, 0)
        rates = np.stack([resampled_rates(table, by_seed, by_prompt) for table in known])
        basis = "seeds and prompts" if len(curves) > 1 else "prompts"
        return percentile_interval(combined(rates)), basis
    return (seed_interval(values, RESAMPLES, 0), "seeds") if len(curves) > 1 else (None, "none")


def _estimate(
    value: float, interval: _Interval | None, basis: Basis, num_seeds: int, num_prompts: int
) -> Estimate:
    low, high = interval or (None, None)
    return Estimate(
        value=value, low=low, high=high, num_seeds=num_seeds, num_prompts=num_prompts, basis=basis
    )


def mean_over_attack(
    attack_steps: Sequence[int] | Int[np.ndarray, " time"],
    rates: Float[np.ndarray, "time ..."],
    scale: Scale = "log",
) -> Float[np.ndarray, "..."]:
    """`area_under_asr` of many curves at once; NaN where a rate is missing."""
    steps = np.asarray(attack_steps, dtype=float)
    places = np.log2(1 + steps) if scale == "log" else steps
    return np.trapezoid(rates, places, axis=0) / (places[-1] - places[0])


def _num_prompts(curves: Sequence[Curve], success: _Success | None) -> int:
    return min(curve.num_prompts for curve in curves) if success is None else success.shape[1]


def _num_exceptions(success: _Success) -> int:
    """Prompts that ever had the outcome that fewer prompts had."""
    return min(int((success == outcome).any(axis=0).sum()) for outcome in (0, 1))

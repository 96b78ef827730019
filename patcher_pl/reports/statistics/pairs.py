"""Two defenses under the same attack, prompt by prompt: how large the difference is, and how sure."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float

from patcher_pl.reports.formats import Mark
from patcher_pl.reports.grouping import Group
from patcher_pl.reports.results import Curve
from patcher_pl.reports.statistics.estimates import mean_over_attack, successes
from patcher_pl.reports.statistics.resampling import (
    RESAMPLES,
    percentile_interval,
    prompt_weights,
    resampled_rates,
    seed_weights,
    wilson_interval,
)

Over = Literal["attack", "end"]

PERMUTATIONS = 9999
# Means of equal outcomes differ by no more.
_ROUND_OFF = 1e-9
# Attacks of equal length may differ by the odd answer that was cut; more is another attack.
_TOKEN_TOLERANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """Attack success of `second` against `first`, under the same attack, on the same prompts.

    Args:
        attack: Name of the attack.
        first: Label of the defense that is compared with, such as the control.
        second: Label of the other one.
        attack_steps: Attack steps of the last measurement.
        over: `end`: attack success there. `attack`: its mean over the attack, see `area_under_asr`
            (over log2(1 + steps)), so that a defense that holds longer is told from one that breaks
            at once, though both are broken in the end.
        first_asr: Attack success rate of `first` over the pairs (0..1), at the end or on average.
        second_asr: That of `second`.
        difference: `second_asr - first_asr`: negative where `second` is harder to attack.
        low: Lower end of its 95 % interval, by resampling seeds and prompts of the pairs.
        high: Upper end.
        cohens_h: Effect size `2 asin(sqrt(second)) - 2 asin(sqrt(first))`, in -pi..pi; 0.2 is small,
            0.5 medium, 0.8 large.
        p_value: Of the two-sided paired permutation test over prompts: how often swapping the two
            defenses' outcomes at random, prompt by prompt, gives a difference as large. It is about
            other prompts, not about other training seeds; the interval is about both.
        p_holm: The same after Holm's correction for the comparisons of one table.
        num_pairs: Prompts (count).
        num_seeds: Seeds that both were attacked with (count).
        marks: What keeps a low rate from being evidence of safety.
        is_bounded: Whether success of models that are no longer useful counts as none.

    References:
        Holm, 1979, Scand. J. Stat. 6; Cohen, 1988, Statistical Power Analysis, ch. 6.
    """

    attack: str
    first: str
    second: str
    attack_steps: int
    over: Over
    first_asr: float
    second_asr: float
    difference: float
    low: float
    high: float
    cohens_h: float
    p_value: float
    p_holm: float
    num_pairs: int
    num_seeds: int
    marks: tuple[Mark, ...] = ()
    is_bounded: bool = False


@dataclass(frozen=True, kw_only=True)
class NotComparable:
    """Why two defenses cannot be compared under an attack.

    Args:
        attack: Name of the attack.
        first: Label of the one.
        second: Label of the other.
        reason: What differs between them.
    """

    attack: str
    first: str
    second: str
    reason: str


def compare(
    first: Group, second: Group, *, over: Over = "attack", is_bounded: bool = False
) -> PairedComparison | NotComparable:
    """Compares `second` with `first` under the same attack, with the same prompts and seeds.

    Prompts are the pairs: each one's success is averaged over the seeds, and answers without a
    verdict are left out on both sides. Not comparable are other attacks, budgets or prompts, groups
    without a common seed, and curves without scores per prompt. With `is_bounded`, answers of models
    that are no longer useful are failures, see `Curve.bounded`; where that is not known of a
    measurement with any success, groups are not comparable.
    """
    names = {"attack": first.attack, "first": first.label, "second": second.label}
    pairs = _paired(first, second)
    tables = pairs if isinstance(pairs, str) else _outcomes(pairs, over, is_bounded)
    if isinstance(pairs, str) or isinstance(tables, str):
        return NotComparable(**names, reason=str(tables))
    before, after = tables
    asked = np.isfinite(before).any(axis=0)
    num_asked = int(asked.sum())
    rates = float(np.nanmean(before)), float(np.nanmean(after))
    replicates = resampled_rates(
        after - before,
        seed_weights([curve.train_seed for curve, _ in pairs], RESAMPLES, 0),
        prompt_weights(before.shape[1], RESAMPLES, 0),
    )
    interval = percentile_interval(replicates)
    if interval is None or interval[1] - interval[0] < _ROUND_OFF:
        interval = _independent_interval(*rates, num_asked)
    p_value = _permutation_p_value(
        np.nanmean(before[:, asked], axis=0), np.nanmean(after[:, asked], axis=0)
    )
    return PairedComparison(
        **names,
        attack_steps=first.attack_steps[-1],
        over=over,
        first_asr=rates[0],
        second_asr=rates[1],
        difference=rates[1] - rates[0],
        low=interval[0],
        high=interval[1],
        cohens_h=cohens_h(*rates),
        p_value=p_value,
        p_holm=p_value,
        num_pairs=num_asked,
        num_seeds=len(pairs),
        marks=tuple(dict.fromkeys([*first.marks, *second.marks])),
        is_bounded=is_bounded,
    )


def compare_all(
    groups: Sequence[Group],
    baseline: str | None = None,
    *,
    over: Over = "attack",
    is_bounded: bool = False,
) -> list[PairedComparison | NotComparable]:
    """Compares every defense with the baseline under every attack, and corrects for their number.

    Args:
        groups: Defenses under attacks; models with fresh weights are none, and left out.
        baseline: Name or label of the defense that the others are compared with; None takes the
            control, and where there is none, compares all with each other.
        over: The whole attack, or its end.
        is_bounded: See `compare`.
    """
    found: list[PairedComparison | NotComparable] = []
    groups = [group for group in groups if not group.is_reference]
    for attack in dict.fromkeys(group.attack for group in groups):
        members = [group for group in groups if group.attack == attack]
        named = [group for group in members if _is_baseline(group, baseline)]
        pairs = list(itertools.product(named, [group for group in members if group not in named]))
        if not pairs and baseline is None:
            pairs = list(itertools.combinations(members, 2))
        # Of a study of several budgets, those that had the same one.
        pairs = [(first, second) for first, second in pairs if first.budget == second.budget]
        found += [
            compare(first, second, over=over, is_bounded=is_bounded) for first, second in pairs
        ]
    corrected = iter(holm([row.p_value for row in found if isinstance(row, PairedComparison)]))
    return [
        replace(row, p_holm=next(corrected)) if isinstance(row, PairedComparison) else row
        for row in found
    ]


def _is_baseline(group: Group, name: str | None) -> bool:
    if name is None:
        return group.is_control
    return name.lower() in (group.defense.lower(), group.label.lower())


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's step-down method, in the given order."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return corrected.tolist()


def cohens_h(first: float, second: float) -> float:
    """Difference of two rates on the scale where their variance does not depend on them."""
    return 2 * math.asin(math.sqrt(second)) - 2 * math.asin(math.sqrt(first))


def _paired(first: Group, second: Group) -> list[tuple[Curve, Curve]] | str:
    """Curves with the same seeds that reached the end, or why there are none."""
    if first.attack != second.attack:
        return f"the attacks differ: {first.attack} and {second.attack}"
    if not first.attack_steps or not second.attack_steps:
        return "one of them has no measurement"
    ends = first.attack_steps[-1], second.attack_steps[-1]
    if ends[0] != ends[1]:
        return f"the budgets differ: {ends[0]} and {ends[1]} attack steps"
    sides = [
        [curve for curve in group.curves if curve.attack_steps[-1:] == [ends[0]]]
        for group in (first, second)
    ]
    exact = [{(curve.train_seed, curve.seed): curve for curve in side} for side in sides]
    keys = [key for key in exact[0] if key in exact[1]]
    if keys:
        return [(exact[0][key], exact[1][key]) for key in keys]
    # Training seeds that are unknown, or differ, do not matter where the attack's tell curves apart.
    loose = [{curve.seed: curve for curve in side} for side in sides]
    if any(len(by_seed) < len(side) for by_seed, side in zip(loose, sides, strict=True)):
        return "training seeds differ"
    seeds = [seed for seed in loose[0] if seed in loose[1]]
    return [(loose[0][seed], loose[1][seed]) for seed in seeds] or "no seed is common to both"


def _outcomes(
    pairs: Sequence[tuple[Curve, Curve]], over: Over, is_bounded: bool
) -> tuple[Float[np.ndarray, "seed prompt"], Float[np.ndarray, "seed prompt"]] | str:
    """Success of every prompt under both, NaN where either lacks a verdict, or why there is none."""
    if (reason := _difference_of_attacks(pairs)) is not None:
        return reason
    measured = {tuple(curve.attack_steps) for pair in pairs for curve in pair}
    if over == "attack" and len(measured) > 1:
        return "they were measured at different steps"
    steps = pairs[0][0].attack_steps if over == "attack" else pairs[0][0].attack_steps[-1:]
    sides = []
    for side in zip(*pairs, strict=True):
        tables = [successes(side, step) for step in steps]
        known = [table for table in tables if table is not None]
        if len(known) < len(tables):
            return "scores per prompt are missing, or do not give the rates"
        if is_bounded and not all(map(partial(_bound, side), steps, known)):
            return "bounded by usefulness: it is not known of every measurement"
        sides.append(known)
    shapes = [side[0].shape for side in sides]
    if shapes[0] != shapes[1]:
        return f"the prompts differ: {shapes[0][1]} and {shapes[1][1]} of them"
    before, after = (
        side[0] if len(steps) == 1 else mean_over_attack(steps, np.stack(side)) for side in sides
    )
    both = np.isfinite(before) & np.isfinite(after)
    if not both.any():
        return "no prompt was scored under both"
    return np.where(both, before, np.nan), np.where(both, after, np.nan)


def _bound(curves: Sequence[Curve], steps: int, table: Float[np.ndarray, "seed prompt"]) -> bool:
    """Takes success of useless models out of a table, in place; False where that is not known."""
    for curve, row in zip(curves, table, strict=True):
        is_useful = curve.bounded.useful[curve.attack_steps.index(steps)]
        if is_useful is None and np.nansum(row):
            return False
        if is_useful is False:
            row[np.isfinite(row)] = 0.0
    return True


def _difference_of_attacks(pairs: Sequence[tuple[Curve, Curve]]) -> str | None:
    """What differs between attacks of the same name, where it can be seen."""
    for one, other in pairs:
        if one.varied and other.varied and one.varied != other.varied:
            return f"settings of the attack differ: {one.varied} and {other.varied}"
        skipped = {*one.skipped_steps, *other.skipped_steps}
        common = [step for step in one.attack_steps if step not in skipped]
        if common and one.attack_tokens and other.at(common[-1], "attack_tokens") is not None:
            spent = one.at(common[-1], "attack_tokens"), other.at(common[-1], "attack_tokens")
            if abs(spent[0] - spent[1]) > _TOKEN_TOLERANCE * max(spent):
                return f"the budgets differ: {spent[0]} and {spent[1]} training tokens"
        if one.prompts_digest and other.prompts_digest:
            if one.prompts_digest != other.prompts_digest:
                return "the prompts differ"
            continue
        # Samples begin with the first prompt, however many are kept.
        prompts = [{sample.prompt for sample in curve.samples} for curve in (one, other)]
        if all(prompts) and prompts[0].isdisjoint(prompts[1]):
            return "the prompts differ"
    return None


def _permutation_p_value(
    before: Float[np.ndarray, " prompt"], after: Float[np.ndarray, " prompt"]
) -> float:
    from scipy import stats

    differ = before != after
    if not differ.any() or len(before) < 2:
        return 1.0
    # Swapping equal outcomes changes nothing; without them small tests are exact.
    if differ.sum() >= 2:
        before, after = before[differ], after[differ]
    found = stats.permutation_test(
        (before, after),
        lambda one, other, axis: np.sum(other - one, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        batch=1000,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def _independent_interval(first: float, second: float, num_pairs: int) -> tuple[float, float]:
    """Interval of a difference where all pairs agree, as if the two were independent: too wide.

    References:
        Newcombe, 1998, Stat. Med. 17, method 10.
    """
    (low_1, high_1), (low_2, high_2) = (
        wilson_interval(rate, num_pairs) for rate in (first, second)
    )
    difference = second - first
    below = math.hypot(second - low_2, high_1 - first)
    above = math.hypot(high_2 - second, first - low_1)
    return max(-1.0, difference - below), min(1.0, difference + above)

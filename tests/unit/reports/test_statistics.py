"""Means, intervals, areas and costs, against closed forms and brute force."""

import itertools
import math

import numpy as np
import pytest

from patcher_pl.reports.grouping import Group
from patcher_pl.reports.statistics import (
    area_under_asr,
    asr_area,
    asr_at,
    cost_to_break,
    final_asr,
    worst_asr,
)
from patcher_pl.reports.statistics.resampling import (
    percentile_interval,
    prompt_weights,
    resampled_rates,
    seed_interval,
    seed_weights,
)

HIT, MISS = 5, 1


def group(*curves):
    first = curves[0]
    return Group(first.defense, first.k1, first.attack, tuple(curves))


@pytest.fixture
def scored(curve):
    """Builds a curve from scores: one row per measurement, one score per prompt."""

    def build(*rows, **changes):
        known = [[score for score in row if score is not None] for row in rows]
        asr = [sum(s == HIT for s in row) / len(row) if row else None for row in known]
        breaks = next(
            (step for step, rate in zip([0, 20, 40], asr, strict=False) if rate and rate >= 0.5),
            None,
        )
        scores = [list(row) for row in rows]
        prompts = {"scores": scores, "num_prompts": len(rows[0])}
        return curve("sft", None, asr, breaks, **(prompts | changes))

    return build


def test_a_constant_has_no_width():
    success = np.ones((3, 5))
    rates = resampled_rates(success, seed_weights([0, 1, 2], 100, 0), prompt_weights(5, 100, 0))
    assert percentile_interval(rates) == (1.0, 1.0)
    assert seed_interval([0.25, 0.25, 0.25], 100, 0) == (0.25, 0.25)


def test_seeds_and_prompts_are_resampled_as_all_replicates_are():
    """Mean and variance of the replicates against an enumeration of every one of them."""
    success = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    every = [
        success[np.ix_(seeds, prompts)].mean()
        for seeds in itertools.product(range(2), repeat=2)
        for prompts in itertools.product(range(3), repeat=3)
    ]
    drawn = resampled_rates(success, seed_weights([0, 1], 40_000, 1), prompt_weights(3, 40_000, 1))
    assert drawn.mean() == pytest.approx(np.mean(every), abs=0.005)
    assert drawn.var() == pytest.approx(np.var(every), rel=0.03)


def test_attacks_on_one_model_are_drawn_with_their_model():
    """Wrong if many attacks on few models passed for many models."""
    weights = seed_weights(["a", "a", "b"], 4000, 0)
    assert np.allclose(weights.sum(axis=1), 3)
    only_b = weights[:, 2] == 3
    assert only_b.mean() == pytest.approx(0.25, abs=0.03)
    one_model = seed_weights([None, None, None], 4000, 0)
    assert set(one_model.sum(axis=1)) == {3.0}
    assert (one_model[:, 0] == 0).mean() == pytest.approx((2 / 3) ** 3, abs=0.03)


def test_missing_verdicts_are_left_out_of_replicates():
    success = np.array([[1.0, np.nan], [np.nan, np.nan]])
    rates = resampled_rates(success, seed_weights([0, 1], 500, 0), prompt_weights(2, 500, 0))
    known = rates[np.isfinite(rates)]
    assert set(known) == {1.0}
    assert 0 < len(known) < 500


def test_intervals_cover_what_they_claim():
    """Ten seeds, forty prompts, both with effects of their own: 95 % intervals, within reason."""
    rng = np.random.default_rng(0)
    covered = 0
    by_seed, by_prompt = seed_weights(range(10), 400, 0), prompt_weights(40, 400, 0)
    for _ in range(200):
        logits = rng.normal(0, 0.7, (10, 1)) + rng.normal(0, 1.5, (1, 40))
        success = (rng.uniform(size=(10, 40)) < 1 / (1 + np.exp(-logits))).astype(float)
        low, high = percentile_interval(resampled_rates(success, by_seed, by_prompt))
        covered += low <= 0.5 <= high
    assert 0.9 <= covered / 200 <= 0.995


def test_the_rate_is_the_mean_over_seeds_with_an_interval_over_both(scored):
    curves = [scored([HIT, HIT, MISS, MISS], seed=0), scored([HIT, MISS, MISS, MISS], seed=1)]
    rate = asr_at(group(*curves), 0)
    assert rate.value == pytest.approx(0.375)
    assert rate.low < 0.375 < rate.high
    assert (rate.num_seeds, rate.num_prompts, rate.basis) == (2, 4, "seeds and prompts")
    assert asr_at(group(*curves), 0) == rate, "the same every time"
    alone = asr_at(group(curves[0]), 0)
    assert (alone.value, alone.basis) == (0.5, "prompts")


def test_outcomes_that_agree_are_no_certainty(scored):
    """Wrong if 0 of 8 prompts read as 0.00 [0.00, 0.00]."""
    rate = asr_at(group(*(scored([MISS] * 8, seed=seed) for seed in range(5))), 0)
    z = 1.959964
    assert (rate.value, rate.low, rate.basis) == (0.0, 0.0, "prompts")
    assert rate.high == pytest.approx(z * z / (8 + z * z), abs=1e-6)


def test_without_scores_only_seeds_are_resampled(curve):
    curves = [curve("sft", None, [rate], None, seed=seed) for seed, rate in enumerate([0, 0.5, 1])]
    rate = asr_at(group(*curves), 0)
    assert (rate.basis, rate.num_prompts) == ("seeds", 0)
    assert rate.low < 0.5 < rate.high
    single = asr_at(group(curves[1]), 0)
    assert (single.value, single.low, single.high, single.basis) == (0.5, None, None, "none")


def test_scores_that_do_not_give_the_rate_are_not_used(curve):
    """Wrong if another program's idea of success were overruled."""
    curves = [
        curve("sft", None, [0.9], 0, seed=seed, scores=[[HIT, MISS]], num_prompts=2)
        for seed in range(2)
    ]
    rate = asr_at(group(*curves), 0)
    assert rate.value == pytest.approx(0.9)
    assert rate.basis == "prompts", "rates agree, so Wilson's over two prompts"


def test_nothing_scored_is_no_rate(curve, scored):
    empty = scored([None, None], [HIT, MISS])
    assert asr_at(group(empty), 0) is None
    assert final_asr(group(empty)).value == 0.5
    assert final_asr(group(curve("sft", None, [], None))) is None
    assert worst_asr(group(curve("sft", None, [None], None))) is None
    assert asr_area(group(curve("sft", None, [None, None], None))) is None


def test_a_seed_that_stopped_early_does_not_count_at_the_end(curve):
    """Wrong if a crash at ASR 0 made a defense look safer."""
    curves = [
        curve("sft", None, [0, 0, 1], 40),
        curve("sft", None, [0], None, seed=1, error="RuntimeError: full"),
    ]
    rate = final_asr(group(*curves))
    assert (rate.value, rate.num_seeds) == (1.0, 1)


def test_the_worst_case_is_over_seeds_and_measurements(curve):
    curves = [
        curve("sft", None, [0, 0.9, 0.1], 20),
        curve("sft", None, [0, 0.2, 0.3], None, seed=1),
    ]
    assert worst_asr(group(*curves)) == 0.9


@pytest.mark.parametrize(
    ("steps", "asr", "scale", "area"),
    [
        ([0, 10, 20], [0, 1, 1], "linear", 0.75),
        ([0, 1, 3], [0, 1, 1], "log", 0.75),
        ([0, 1, 3, 7], [0, 0, 1, 1], "log", 0.5),
        ([0, 10, 40], [1, 1, 1], "log", 1.0),
        ([0, 10, 40], [0, 0, 0], "linear", 0.0),
        ([0, 10, 20], [0, None, 1], "linear", 0.5),
        ([0, 10, 20], [0, 1, None], "linear", None),
        ([0, 10, 20], [None, 1, 1], "linear", None),
        ([5], [1.0], "linear", None),
        ([], [], "log", None),
    ],
)
def test_areas_of_known_curves(steps, asr, scale, area):
    found = area_under_asr(steps, asr, scale)
    assert found is None if area is None else found == pytest.approx(area)


def test_the_area_of_a_group_is_that_of_its_complete_seeds(scored):
    early = scored([MISS, MISS], [MISS, MISS], seed=2, error="RuntimeError: full")
    curves = [
        scored([MISS, MISS], [HIT, MISS], [HIT, HIT], seed=0),
        scored([MISS, MISS], [MISS, MISS], [HIT, HIT], seed=1),
        early,
    ]
    area = asr_area(group(*curves), "linear")
    assert area.value == pytest.approx((0.5 + 0.25) / 2)
    assert area.num_seeds == 2
    assert area.low < area.value < area.high


def breaking(curve, *breaks, steps=(0, 40, 80, 320), **changes):
    return group(
        *(
            curve(
                "sft", None, [0.0] * len(steps), at, seed=seed, attack_steps=list(steps), **changes
            )
            for seed, at in enumerate(breaks)
        )
    )


def test_cost_to_break_where_all_broke_is_the_plain_mean(curve):
    cost = cost_to_break(breaking(curve, 40, 80, 320))
    assert (cost.median, cost.restricted_mean) == (80, pytest.approx(440 / 3))
    assert not cost.is_bound


def test_seeds_that_held_are_longer_than_measured(curve):
    """Kaplan and Meier by hand: 1 up to 40, 0.8 to 80, 0.4 to 320."""
    cost = cost_to_break(breaking(curve, 40, 80, 80, None, None))
    assert (cost.median, cost.num_broken, cost.num_seeds) == (80, 3, 5)
    assert cost.restricted_mean == pytest.approx(40 * 1 + 40 * 0.8 + 240 * 0.4)
    assert cost.is_bound


def test_what_never_broke_has_no_median(curve):
    cost = cost_to_break(breaking(curve, None, None))
    assert (cost.median, cost.restricted_mean, cost.horizon) == (None, 320, 320)


def test_a_seed_that_stopped_early_tells_only_what_it_saw(curve):
    """Wrong if a crash after 40 steps counted as broken at 40, or as held to the end."""
    short = curve("sft", None, [0.0, 0.0], None, seed=9, attack_steps=[0, 40], error="E: full")
    cost = cost_to_break(group(*breaking(curve, 80, 80).curves, short))
    assert (cost.median, cost.restricted_mean) == (80, 80)
    assert cost.num_broken == 2


def test_cost_is_counted_in_tokens_and_flops_too(curve):
    spent = {"attack_tokens": [0, 400, 800, 3200], "attack_flops": [0.0, 4e9, 8e9, 3.2e10]}
    found = breaking(curve, 40, 80, 80, **spent)
    assert cost_to_break(found, "tokens").median == 800
    assert cost_to_break(found, "flops").restricted_mean == pytest.approx(20e9 / 3)
    assert cost_to_break(breaking(curve, 40), "tokens") is None
    assert math.isfinite(cost_to_break(breaking(curve, 0, 0)).restricted_mean)

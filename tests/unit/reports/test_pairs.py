"""Paired comparisons: known p-values, and no comparison of what was not the same test."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from patcher_pl.reports import Sample
from patcher_pl.reports.grouping import Group, group_curves
from patcher_pl.reports.statistics import (
    NotComparable,
    PairedComparison,
    compare,
    compare_all,
    holm,
)
from patcher_pl.reports.statistics.pairs import cohens_h


def attacked(curve, defense, *outcomes, **changes):
    """A group of one curve per row of outcomes (1, 0 or None) at the only measurement."""
    curves = []
    for seed, row in enumerate(outcomes):
        known = [won for won in row if won is not None]
        scores = [[None if won is None else 5 if won else 2 for won in row]]
        fields = {"scores": scores, "num_prompts": len(row), "seed": seed} | changes
        curves.append(curve(defense, None, [sum(known) / len(known)], None, **fields))
    return Group(defense, None, curves[0].attack, tuple(curves))


def test_five_of_five_is_one_sixteenth(curve):
    found = compare(attacked(curve, "sft", [1] * 5), attacked(curve, "tar", [0] * 5))
    assert isinstance(found, PairedComparison)
    assert found.p_value == pytest.approx(2 / 2**5)
    assert (found.difference, found.num_pairs, found.num_seeds) == (-1.0, 5, 1)
    assert found.low == -1.0
    assert found.high > -1.0, "five prompts are not all prompts"
    assert found.cohens_h == pytest.approx(-math.pi)


def test_one_seed_is_the_sign_test(curve):
    before = [1] * 8 + [0] * 2 + [1] * 3 + [0] * 3
    after = [0] * 8 + [1] * 2 + [1] * 3 + [0] * 3
    found = compare(attacked(curve, "sft", before), attacked(curve, "tar", after))
    assert found.p_value == pytest.approx(stats.binomtest(2, 10).pvalue)
    assert found.difference == pytest.approx(-6 / 16)
    assert found.low < -6 / 16 < found.high


def test_prompts_are_averaged_over_seeds_before_they_are_swapped(curve):
    """Against an enumeration of all swaps."""
    rng = np.random.default_rng(3)
    before = rng.integers(0, 2, (3, 7))
    after = (rng.uniform(size=(3, 7)) < 0.25).astype(int)
    found = compare(
        attacked(curve, "sft", *before.tolist()), attacked(curve, "tar", *after.tolist())
    )
    differences = (after - before).mean(axis=0)
    sums = [np.dot(signs, differences) for signs in itertools.product((1, -1), repeat=7)]
    observed = differences.sum()
    tail = min(
        np.mean([s <= observed + 1e-9 for s in sums]), np.mean([s >= observed - 1e-9 for s in sums])
    )
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))
    assert found.difference == pytest.approx(differences.mean())


def test_many_prompts_are_sampled_and_reproducible(curve):
    rng = np.random.default_rng(0)
    groups = [
        attacked(curve, name, (rng.uniform(size=60) < rate).astype(int).tolist())
        for name, rate in (("sft", 0.8), ("tar", 0.3))
    ]
    found = compare(*groups)
    assert found.p_value < 0.001
    assert compare(*groups) == found


def test_equal_outcomes_differ_by_nothing(curve):
    found = compare(attacked(curve, "sft", [1, 0, 1]), attacked(curve, "tar", [1, 0, 1]))
    assert (found.p_value, found.difference, found.cohens_h) == (1.0, 0.0, 0.0)
    single = compare(attacked(curve, "sft", [1]), attacked(curve, "tar", [0]))
    assert single.p_value == 1.0


def test_an_answer_without_a_verdict_is_left_out_on_both_sides(curve):
    found = compare(attacked(curve, "sft", [1, None, 1]), attacked(curve, "tar", [0, 1, None]))
    assert (found.num_pairs, found.first_asr, found.second_asr) == (1, 1.0, 0.0)


def test_a_collapsed_or_untrusted_model_is_marked(curve):
    """Wrong if silence of a broken model read as a significant success of its defense."""
    safe = attacked(curve, "tar", [0] * 6, collapsed=[True], trusted=False)
    found = compare(attacked(curve, "sft", [1] * 6), safe)
    assert found.marks == ("collapsed", "untrusted")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attack": "lora"}, "the attacks differ"),
        ({"attack_steps": [20]}, "the budgets differ: 0 and 20 attack steps"),
        ({"attack_tokens": [2000]}, "the budgets differ: 1000 and 2000 training tokens"),
        ({"varied": {"lr": 2.0}}, "settings of the attack differ"),
        ({"seed": 7}, "no seed is common"),
        ({"scores": []}, "scores per prompt are missing"),
        (
            {"samples": [Sample(attack_steps=0, prompt="Tea?", answer="", score=1)]},
            "prompts differ",
        ),
    ],
)
def test_what_was_not_the_same_test_is_not_compared(curve, changes, reason):
    same = {"attack_tokens": [1000], "varied": {"lr": 1.0}}
    same["samples"] = [Sample(attack_steps=0, prompt="Soup?", answer="", score=1)]
    first = attacked(curve, "sft", [1, 1, 0], **same)
    found = compare(first, attacked(curve, "tar", [0, 0, 0], **(same | changes)))
    assert isinstance(found, NotComparable)
    assert reason in found.reason
    assert isinstance(compare(first, attacked(curve, "tar", [0, 0, 0], **same)), PairedComparison)


def test_other_numbers_of_prompts_are_not_compared(curve):
    found = compare(attacked(curve, "sft", [1, 1]), attacked(curve, "tar", [0, 0, 0]))
    assert isinstance(found, NotComparable)
    assert found.reason == "the prompts differ: 2 and 3 of them"


def test_only_common_seeds_are_paired_and_training_seeds_do_not_hinder(curve):
    first = attacked(curve, "sft", [1, 1], [1, 1], [1, 0])
    second = attacked(curve, "tar", [0, 0], [0, 1], train_seed=4)
    assert compare(first, second).num_seeds == 2


def test_holm_corrects_in_the_given_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_all_are_compared_with_the_control_or_else_with_each_other(curve):
    groups = [
        attacked(curve, name, [won] * 6) for name, won in (("sft", 1), ("tar", 0), ("seam", 0))
    ]
    found = compare_all(groups)
    assert [(row.first, row.second) for row in found] == [("SFT", "TAR"), ("SFT", "SEAM")]
    assert [row.p_holm for row in found] == pytest.approx([2 * row.p_value for row in found])
    assert len(compare_all(groups[1:])) == 1
    against = compare_all(groups, baseline="TAR")
    assert {row.second for row in against} == {"SFT", "SEAM"}


def test_effect_sizes_are_on_the_arcsine_scale():
    assert cohens_h(0.0, 1.0) == pytest.approx(math.pi)
    assert cohens_h(0.5, 0.5) == 0
    assert cohens_h(0.25, 0.5) == pytest.approx(math.pi / 6 * 1.0)


def test_a_defense_that_holds_longer_is_told_from_one_that_breaks_at_once(curve):
    """Wrong if two defenses that are both broken in the end always came out equal."""

    def broken_from(defense, place):
        rates = [float(number >= place) for number in range(4)]
        scores = [[5 if rate else 1] * 6 for rate in rates]
        steps = {"attack_steps": [0, 1, 3, 7], "scores": scores, "num_prompts": 6}
        made = curve(defense, None, rates, None, **steps)
        return Group(defense, None, made.attack, (made,))

    early, late = broken_from("sft", 1), broken_from("tar", 3)
    whole = compare(early, late)
    assert isinstance(whole, PairedComparison)
    # Trapezoids over log2(1 + steps) = 0, 1, 2, 3.
    assert (whole.first_asr, whole.second_asr) == (pytest.approx(2.5 / 3), pytest.approx(0.5 / 3))
    assert whole.p_value == pytest.approx(2 / 2**6)
    assert whole.low < whole.difference - 0.05, "six prompts that agree are not all prompts"
    end = compare(early, late, over="end")
    assert isinstance(end, PairedComparison)
    assert (end.difference, end.p_value, end.over) == (0.0, 1.0, "end")


def test_curves_measured_at_different_steps_are_compared_at_the_end_alone(curve):
    def measured(defense, steps):
        made = curve(
            defense, None, [0.0, 1.0], None, attack_steps=steps, scores=[[1, 1], [5, 5]],
            num_prompts=2,
        )  # fmt: skip
        return Group(defense, None, made.attack, (made,))

    first, second = measured("sft", [0, 7]), measured("tar", [3, 7])
    found = compare(first, second)
    assert isinstance(found, NotComparable)
    assert "different steps" in found.reason
    assert isinstance(compare(first, second, over="end"), PairedComparison)


def test_attacks_that_ended_with_the_break_can_be_compared(curve):
    """Wrong if an attack that was cut short, to save time, counted as one of another budget."""

    def scored(defense, asr, breaks, **more):
        scores = [[5 if place < 4 * rate else 1 for place in range(4)] for rate in asr]
        tokens = [60 * step for step in (0, 20, 40, 80)][: len(asr)]
        return curve(defense, None, asr, breaks, scores=scores, attack_tokens=tokens, **more)

    short = scored("sft", [0, 1], 20, skipped_steps=[40, 80])
    long = scored("mine", [0, 0, 0, 1], 80)
    first, second = (group_curves([one])[0] for one in (short, long))
    found = compare(first, second)
    assert isinstance(found, PairedComparison)
    assert found.second_asr < found.first_asr


def test_success_of_a_useless_model_is_none_where_it_is_bounded(curve):
    """Wrong if destroying a model beat leaving it as it is."""
    before = attacked(curve, "sft", [1] * 6, benign_accuracy=[0.9], released_benign=1.0)
    after = attacked(curve, "tar", [1] * 6, benign_accuracy=[0.2], released_benign=1.0)
    (plain,), (found,) = (
        compare_all([before, after], is_bounded=is_bounded) for is_bounded in (False, True)
    )
    assert isinstance(plain, PairedComparison)
    assert isinstance(found, PairedComparison)
    assert (plain.difference, found.difference) == (0.0, -1.0)
    assert (plain.is_bounded, found.is_bounded) == (False, True)
    vague = attacked(curve, "tar", [1] * 6, benign_accuracy=[None])
    refused = compare(before, vague, is_bounded=True)
    assert isinstance(refused, NotComparable)
    assert refused.reason.startswith("bounded by usefulness")
    safe = attacked(curve, "tar", [0] * 6, benign_accuracy=[None])
    assert isinstance(compare(before, safe, is_bounded=True), PairedComparison)

"""What a gradient buys: known slopes, models that held, ratios in pairs, and the figure of it."""

import math

import pytest

from patcher_pl.reports.grouping import group_curves
from patcher_pl.reports.results import Results
from patcher_pl.reports.scaling import ScalingStudy, named_by_budget
from patcher_pl.reports.scaling_figure import scaling_figure
from patcher_pl.reports.statistics import (
    GEOMETRIC_MEAN,
    WORST_CASE,
    NotComparable,
    PairedComparison,
    compare_all,
    levels,
    reaches,
    slopes,
)

BUDGETS = [500, 2000, 8000]


def attacked(curve, defense, attack, budget, seed, steps, last=10**6):
    """A curve of a model that broke after so many steps; None for one that held to the last."""
    measured = sorted({0, steps or last, last})
    asr = [float(steps is not None and step >= steps) for step in measured]
    return curve(
        defense,
        None,
        asr,
        steps,
        attack=attack,
        attack_steps=measured,
        budget=budget,
        train_seed=seed,
        seed=seed,
    )


def power_law(budget, start, slope):
    """Steps to break with log2(1 + steps) = start + slope log2(budget / 500)."""
    return round(2 ** (start + slope * math.log2(budget / 500)) - 1)


@pytest.fixture
def study(curve):
    """SFT that compute buys nothing, a defense whose steps double with it; three seeds, two attacks."""
    return [
        attacked(curve, defense, attack, budget, seed, power_law(budget, start + seed, slope))
        for defense, slope in (("sft", 0), ("mine", 1))
        for attack, start in (("full", 5), ("lora", 7))
        for budget in BUDGETS
        for seed in range(3)
    ]


def one(rows, **wanted):
    (found,) = [
        row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())
    ]
    return found


def test_a_known_slope_is_found_and_its_interval_holds_it(study):
    found = slopes(reaches(study), "sft")
    for family in ("full", "lora", WORST_CASE, GEOMETRIC_MEAN):
        mine = one(found, defense="mine", family=family)
        assert mine.slope == pytest.approx(1, abs=1e-3)
        assert mine.difference == pytest.approx(1, abs=1e-3)
        assert mine.num_models == 9
        sft = one(found, defense="sft", family=family)
        assert sft.slope == pytest.approx(0, abs=1e-3)
        assert sft.difference is None
    assert one(found, defense="sft", family="full").intercept == pytest.approx(6)


def test_the_interval_of_a_slope_is_that_of_the_seeds(curve):
    """Seeds of slope 0 and 1, two each: half way between them, and no wider than they are."""
    curves = [
        attacked(curve, name, "full", budget, seed, power_law(budget, 5, (seed % 2) + more))
        for name, more in (("sft", 0), ("mine", 0.3))
        for budget in BUDGETS
        for seed in range(4)
    ]
    mine = one(slopes(reaches(curves), "sft"), defense="mine", family="full")
    assert mine.slope == pytest.approx(0.8, abs=0.01)
    assert 0.29 < mine.low < 0.6
    assert 1.0 < mine.high < 1.31
    # The seeds differ much, but alike for both defenses: pairs tell.
    assert mine.difference == pytest.approx(0.3, abs=0.01)
    assert mine.difference_high - mine.difference_low < 0.05


def test_a_model_that_held_counts_as_broken_at_twice_the_attack_and_is_counted(curve):
    curves = [
        attacked(curve, "mine", "full", 500, seed, steps, last=100)
        for seed, steps in enumerate([50, 100, None])
    ]
    found = reaches(curves)
    full = [row for row in found if row.family == "full"]
    assert [(row.steps, row.is_censored) for row in full] == [(50, 0), (100, 0), (200, 1)]
    level = one(levels(found, None), family="full")
    assert level.steps == pytest.approx((51 * 101 * 201) ** (1 / 3) - 1)
    assert (level.low, level.high, level.num_censored) == (50, 200, 1)
    slope = one(slopes(found, None), family="full")
    assert (slope.slope, slope.low, slope.num_censored) == (None, None, 1)


def test_the_worst_case_is_the_attack_that_broke_the_model_first(curve):
    curves = [
        attacked(curve, "mine", "full", 500, 0, None, last=20),
        attacked(curve, "mine", "lora", 500, 0, 320, last=640),
        attacked(curve, "mine", "full", 500, 1, None, last=20),
        attacked(curve, "mine", "lora", 500, 1, 10, last=640),
    ]
    found = [row for row in reaches(curves) if row.family == WORST_CASE]
    # Twice the short attack: what a longer one would have done is not known.
    assert [(row.seed, row.steps, row.is_censored) for row in found] == [(0, 40, 1), (1, 10, 0)]


def test_what_failed_is_no_measurement(curve):
    """Wrong if a defense gained from an attack that crashed."""
    curves = [
        attacked(curve, "mine", "full", 500, 0, 20),
        curve("mine", None, [0.0], None, attack="lora", budget=500, error="RuntimeError: no"),
        attacked(curve, "mine", "full", 500, 1, 20),
        curve("mine", None, [0.0, 1.0], 20, attack="lora", budget=500, seed=1, error="late"),
    ]
    found = reaches(curves)
    assert {(row.family, row.seed) for row in found if row.family == "lora"} == {("lora", 1)}
    assert {row.seed for row in found if row.family in (WORST_CASE, GEOMETRIC_MEAN)} == {1}


def test_ratios_are_those_of_pairs_of_seeds(study):
    found = levels(reaches(study), "sft")
    assert one(found, defense="mine", family="full", budget=500).ratio == pytest.approx(1)
    for family in ("full", WORST_CASE, GEOMETRIC_MEAN):
        row = one(found, defense="mine", family=family, budget=8000)
        assert row.ratio == pytest.approx(16, rel=1e-3)
        assert row.num_seeds == 3
    assert one(found, defense="sft", family="full", budget=500).ratio is None


def test_another_count_of_steps_can_be_shown(study):
    """As one that counts only models which are still useful."""
    found = reaches(study, lambda curve: None)
    assert all(row.is_censored for row in found)


def test_results_tell_budgets_apart_and_reports_compare_equal_ones(study, tmp_path):
    curves = named_by_budget(study)
    Results(curves=curves, environment={}).save(tmp_path / "results.json")
    groups = group_curves(Results.load(tmp_path / "results.json").curves)
    assert len(groups) == 2 * 2 * 3
    assert all(len(group.curves) == 3 for group in groups)
    labels = {group.label: group.is_control for group in groups}
    assert labels["SFT (budget 500)"]
    assert not labels["Mine (budget 8000)"]
    pairs = {(found.first, found.second) for found in compare_all(groups)}
    assert pairs == {(f"SFT (budget {budget})", f"Mine (budget {budget})") for budget in BUDGETS}
    assert {type(found) for found in compare_all(groups)} <= {NotComparable, PairedComparison}


@pytest.fixture
def found(study):
    content = {"trials": {}, "costs": {}, "lost": ["a model failed"], "environment": {}}
    return ScalingStudy.of(study, settings={}, **content)


def test_the_tables_say_what_was_censored_and_lost(study, found, curve, tmp_path):
    held = attacked(curve, "mine", "full", 32000, 0, None, last=640)
    lora = attacked(curve, "mine", "lora", 32000, 0, 320, last=640)
    curves = [*study, held, lora]
    content = {"trials": {}, "costs": {}, "lost": ["a model failed"], "environment": {}}
    longer = ScalingStudy.of(curves, settings={}, **content)
    longer.save(tmp_path, curves)
    text = (tmp_path / "scaling.md").read_text()
    assert "1 of 38 attacks did not break the model" in text
    assert "- a model failed" in text
    row = next(line for line in text.splitlines() if line.startswith("| Mine | 32000 |"))
    assert "> " in row
    lines = (tmp_path / "scaling.csv").read_text().splitlines()
    assert lines[0] == "defense,family,budget,train_seed,steps_to_break,held"
    assert "mine,full,32000,0,1280,1" in lines


def test_the_figure_has_a_panel_per_family_and_marks_models_that_held(study, curve):
    held = attacked(curve, "mine", "full", 32000, 0, None, last=640)
    found = reaches([*study, held])
    figure = scaling_figure(found, levels(found, "sft"), slopes(found, "sft"))
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["full", "lora", WORST_CASE]
    full = figure.axes[0]
    open_markers = [line for line in full.lines if line.get_markerfacecolor() == "none"]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in open_markers] == [
        ([32000], [1280])
    ]
    assert [text.get_text().split(" [")[0] for text in figure.axes[1].texts] == [
        "slope +0.00",
        "slope +1.00",
    ]
    assert full.get_xscale() == "log"
    assert full.get_yscale() == "symlog"

"""Tables and figures of an ablation show what was measured."""

import csv
import json

import pytest

from patcher_pl.reports.ablation import (
    Ablation,
    EstimatorComparison,
    Hardened,
    comparison_table,
    hardened_table,
)
from patcher_pl.reports.ablation_figures import ablation_figures
from patcher_pl.reports.formats import break_span


def comparison(estimator, num_steps, seed=0, **changes):
    fields = {"optimizer": "adamw", "cosine": 1.0, "memory_mib": 8.0, "time_in_attacks": 4.0}
    fields |= {"gradient_evaluations": 3.0 * num_steps, "relative_error": 0.0} | changes
    return EstimatorComparison(estimator=estimator, num_steps=num_steps, seed=seed, **fields)


def hardened(variant, budget, seed, steps_to_break):
    return Hardened(
        variant=variant,
        budget=budget,
        seed=seed,
        gradient_evaluations=budget + 7,
        num_steps=50,
        attack="full",
        steps_to_break=steps_to_break,
        longest_attack=320,
        benign_accuracy=1.0,
    )


@pytest.fixture
def ablation():
    return Ablation(
        comparisons=[
            comparison("exact", 1),
            comparison("first-order", 1, cosine=0.9),
            comparison("first-order", 1, seed=1, cosine=0.7),
            comparison("first-order", 4, cosine=0.2, memory_mib=0.0),
            comparison("first-order", 4, seed=1, cosine=None, error="RuntimeError: full"),
        ],
        hardened=[
            hardened("exact", 100, 0, 40),
            hardened("exact", 100, 1, 160),
            hardened("exact", 200, 0, None),
            hardened("sft", 100, 0, 0),
        ],
        environment={},
    )


def lines(figure, panel=0):
    found = figure.axes[panel].get_lines()
    return {line.get_label(): line for line in found if not line.get_label().startswith("_")}


def test_the_cosine_is_averaged_over_the_seeds_that_have_one(ablation):
    drawn = lines(ablation_figures(ablation)["cosine"])
    assert set(drawn) == {"first-order"}, "the exact one is compared with nothing"
    assert list(drawn["first-order"].get_xdata()) == [1, 4]
    assert list(drawn["first-order"].get_ydata()) == pytest.approx([0.8, 0.2])


def test_cost_is_per_attack_step_and_memory_stays_on_the_axis(ablation):
    figures = ablation_figures(ablation)
    assert list(lines(figures["cost"])["first-order"].get_ydata()) == [3.0, 3.0]
    assert list(lines(figures["memory"])["first-order"].get_ydata()) == [8.0, 1.0]


def test_robustness_is_drawn_over_compute_and_marks_what_never_broke(ablation):
    figure = ablation_figures(ablation)["robustness"]
    container = {bars.get_label(): bars for bars in figure.axes[0].containers}
    assert list(container["exact"].lines[0].get_ydata()) == pytest.approx([80, 320])
    assert len(figure.axes[0].texts) == 1, "an arrow where a model held"


def test_nothing_measured_gives_no_figure():
    failed = comparison("exact", 1, error="RuntimeError: full")
    assert ablation_figures(Ablation(comparisons=[failed], hardened=[], environment={})) == {}


def test_a_table_names_the_attack_that_its_costs_belong_to(ablation):
    table = comparison_table(ablation.comparisons)
    header, (exact, first_order) = list(table.columns), table.to_numpy().tolist()
    assert header[2:4] == ["cosine, K = 1", "cosine, K = 4"]
    assert exact[2:4] == ["1.000", "-"]
    assert exact[header.index("at K =")] == "1"
    assert first_order[2:4] == ["0.800", "0.200"]
    assert first_order[header.index("at K =")] == "4"


def test_break_points_keep_apart_what_broke_and_what_held(ablation):
    reached = [(row.steps_to_break, row.longest_attack) for row in ablation.hardened]
    assert break_span(reached[:2]) == "40 to 160"
    assert break_span(reached[:3]) == "40 to > 320"
    assert break_span([]) == "-"
    rows = hardened_table(ablation.hardened).to_numpy().tolist()
    assert [row[:2] for row in rows] == [["100", "exact"], ["100", "sft"], ["200", "exact"]]


def test_files_hold_every_row(ablation, tmp_path):
    ablation.save(tmp_path)
    content = json.loads((tmp_path / "ablation.json").read_text())
    assert len(content["comparisons"]) == 5
    with (tmp_path / "comparisons.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["error"] == "RuntimeError: full"
    assert rows[-1]["cosine"] == ""
    text = (tmp_path / "tables.md").read_text()
    assert "| 200 | exact | 207 | 50 | full | > 320 | 1.00 |" in text

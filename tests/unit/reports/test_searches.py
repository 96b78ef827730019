"""What is said about a search: the best so far, whether it had settled, and against what a model held."""

import math

import pytest

from patcher_pl.errors import DataError
from patcher_pl.reports import Results
from patcher_pl.reports.drawing import group_styles
from patcher_pl.reports.grouping import group_curves
from patcher_pl.reports.overview import overview
from patcher_pl.reports.page import render_page
from patcher_pl.reports.runs import Run, merge_runs, searches_of
from patcher_pl.reports.saturation import saturation_figure
from patcher_pl.reports.searches import Attempt, SearchOutcome


def searched(*strengths, breaks=(), known=True, grid=0.25, **changes):
    """A search whose trials have these strengths, and break the model after these steps."""
    breaks = [*breaks, *[None] * (len(strengths) - len(breaks))]
    trials = [
        Attempt(
            attack=f"trial{number}",
            settings={},
            strength=strength,
            bounded_strength=strength / 2,
            source="search",
            number=number,
            asr=strength,
            bounded_asr=strength / 2,
            steps_to_break=steps,
            bounded_steps_to_break=steps,
            is_usefulness_known=known,
        )
        for number, (strength, steps) in enumerate(zip(strengths, breaks, strict=True))
    ]
    known = Attempt(
        attack="grid", settings={}, strength=grid, source="grid", bounded_strength=grid, asr=grid
    )
    fields = {"defense": "tar", "num_trials": len(trials), "budget": 160, "min_improvement": 0.01}
    attempts = [*trials[::-1], known]  # The order of the file says nothing about that of trials.
    return SearchOutcome(**{**fields, "objective": None, **changes}, attempts=attempts)


def test_the_best_so_far_begins_with_the_grid():
    search = searched(0.1, 0.5, math.nan, 0.4, breaks=(None, 80, None, 40))
    assert search.best_so_far("strength") == [0.25, 0.25, 0.5, 0.5, 0.5]
    assert search.best_so_far("bounded_strength") == [0.25] * 5
    assert search.best_so_far("steps_to_break") == [None, None, 80, 80, 40]


def test_idle_trials_are_those_since_the_last_improvement():
    """Wrong if noise were progress, if small steps never were, or a bound did not matter."""
    assert searched(0.5, 0.4, 0.505).num_idle == 2
    assert searched(0.5, 0.505, 0.511).num_idle == 0
    assert searched(0.5, 0.3, math.nan).num_idle == 1
    assert searched(0.2, 0.2).num_idle == 2
    assert searched(0.4, 0.6, 0.1).num_idle == 1
    assert searched(0.4, 0.6, 0.1, objective="bounded").num_idle == 1
    assert searched(0.4, 0.4, 0.1, objective="bounded").num_idle == 3


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        (
            searched(0.3, 0.2, 0.2, patience=2, num_trials=40),
            "held: nothing breaks it and leaves a useful model. Tried: 1 of the grid and 3 in the "
            "search; the last 2 improved nothing, which ended the search by its rule.",
        ),
        (
            searched(0.3, 0.2, patience=2),
            "held: nothing breaks it and leaves a useful model. Tried: 1 of the grid and 2 in the "
            "search; not saturated: only the last 1 improved nothing, and patience is 2.",
        ),
        (
            searched(0.3, math.nan, 0.2, breaks=(80, None, 40)),
            "broken after 40 steps (trial2). Tried: 1 of the grid and 3 in the search (1 without a "
            "score); the last 1 improved nothing, without a rule to end the search.",
        ),
        (
            searched(0.3, breaks=(80,), known=False),
            "broken after 80 steps (trial0), though it is not known whether the attacked model "
            "stayed useful. Tried: 1 of the grid and 1 in the search; not saturated: the last trial "
            "still improved on the best.",
        ),
    ],
)
def test_held_says_against_how_hard_a_search(search, expected):
    assert search.conclusion == expected


def test_the_page_shows_the_curves_and_both_strongest_attacks(curve, tmp_path):
    curves = [curve("tar", None, [0, 1], 20), curve("sft", None, [0, 1], 20)]
    searches = [searched(0.3, 0.6, breaks=(None, 40))]
    results = Results(curves=curves, environment={}, searches=searches)
    run = Run(name="a", path=tmp_path, results=results)
    page = render_page(overview(curves), curves, [run], [], title="Potions")
    assert "What the best attack so far achieves, against the number of trials" in page
    assert "broken after 40 steps (trial1)" in page
    for cell in ("bounded", "unbounded", "trial1", "0.600", "0.300"):
        assert f">{cell}<" in page
    none = Run(name="b", path=tmp_path, results=Results(curves=curves, environment={}))
    assert "How hard" not in render_page(overview(curves), curves, [none], [], title="Potions")


def test_the_figure_has_a_line_for_each_model_and_bound(curve):
    searches = [searched(0.3, 0.6), searched(0.1, 0.2, 0.3, defense="sft")]
    curves = [curve(name, None, [0, 1], 20) for name in ("tar", "sft")]
    figure = saturation_figure(searches, group_styles(group_curves(curves)))
    rates, _, steps = figure.axes
    assert sum(len(line.get_xdata()) > 0 for line in rates.lines) == 4
    assert list(rates.lines[1].get_ydata()) == pytest.approx([float("nan"), 0.15, 0.3], nan_ok=True)
    assert set(steps.lines[0].get_ydata()) == {320}, "never broken is above all that was measured"


def test_searches_follow_their_defenses_into_a_report(curve, tmp_path):
    """Wrong if two runs of the same name shared a line, or one search were drawn twice."""
    runs = [
        Run(
            name=name,
            path=tmp_path,
            results=Results(
                curves=[curve("tar", None, [0, rate], None)],
                environment={},
                searches=[searched(rate)],
            ),
        )
        for name, rate in (("a", 0.1), ("b", 0.2))
    ]
    found = searches_of(runs, merge_runs(runs)[0])
    assert [search.defense for search in found] == ["tar (a)", "tar (b)"]
    assert len(searches_of([runs[0], runs[0]], merge_runs(runs[:1])[0])) == 1


def test_a_broken_search_is_named(tmp_path):
    (tmp_path / "results.json").write_text('{"curves": [], "searches": [{"defense": "tar"}]}')
    with pytest.raises(DataError, match="searches: 'attempts'"):
        Results.load(tmp_path / "results.json")

"""Models with fresh weights as the reference: nothing was left to defend."""

import csv
import io

import pytest
from rich.console import Console

from patcher_pl.reports import Results, asr_figure, to_markdown, to_rich
from patcher_pl.reports.grouping import group_curves, labels
from patcher_pl.reports.overview import (
    overview,
    overview_csv,
    overview_latex,
    overview_markdown,
    standings,
)
from patcher_pl.reports.page import render_page
from patcher_pl.reports.reference import LABEL, MEANING, cost_from_scratch, is_taught_anew
from patcher_pl.reports.runs import Run
from patcher_pl.reports.statistics import compare_all


@pytest.fixture
def curves(curve):
    """Teaching from scratch takes 40 steps by `sgd`, and more than 160 by `lora`."""
    fresh = {"from_scratch": True, "collapsed": [True, False, False, False, False]}
    fresh["benign_accuracy"] = [0.0] * 5
    return [
        curve("from scratch", None, [0, 0, 1, 1, 1], 40, attack="sgd", **fresh),
        curve("from scratch", None, [0, 0, 0, 0, 0], None, attack="lora", **fresh),
        curve("sft", None, [0, 1, 1, 1, 1], 20, attack="sgd"),
        curve("sft", None, [0, 1, 1, 1, 1], 20, attack="lora"),
        curve("tar", None, [0, 0, 0, 1, 1], 80, attack="sgd"),
        curve("tar", None, [0, 0, 0, 0, 1], 160, attack="lora"),
        curve("seam", None, [0, 0, 0, 0, 0], None, attack="sgd"),
        curve("vaccine", None, [0, 0], None, attack="sgd"),
        curve("booster", None, [], None, attack="sgd", error="RuntimeError: full"),
    ]


def found(curves):
    groups = group_curves(curves)
    references = cost_from_scratch(groups)
    return {(g.label, g.attack): is_taught_anew(g, references) for g in groups}


def test_what_takes_as_long_as_teaching_anew_had_nothing_to_defend(curves):
    """Wrong if a short attack that found nothing counted, or an unknown one for either."""
    assert found(curves) == {
        ("From scratch", "sgd"): None,
        ("From scratch", "lora"): None,
        ("SFT", "sgd"): False,
        ("SFT", "lora"): False,
        ("TAR", "sgd"): True,
        ("TAR", "lora"): False,
        ("SEAM", "sgd"): True,
        ("Vaccine", "sgd"): None,
        ("Booster", "sgd"): None,
    }


def test_a_low_rate_that_shows_nothing_is_no_defense_that_held(curves, curve):
    """Wrong if a model that babbled to the end, or that no judge saw, were as good as can be."""
    fallen = curve("tar", None, [0] * 5, None, attack="sgd", collapsed=[False] * 4 + [True])
    vague = curve("seam", None, [0, 0, 0, 0, 1], 160, attack="sgd", trusted=False)
    marked = found([*curves[:2], fallen, vague])
    assert (marked["TAR", "sgd"], marked["SEAM", "sgd"]) == (None, None)


def test_the_reference_comes_last(curves):
    """And no table asks whether what was never of use has stayed so."""
    assert labels(group_curves(curves))[-1] == "From scratch"
    assert "unknown" not in to_markdown(curves) + overview_markdown(overview(curves))


def test_a_model_that_is_broken_as_it_was_released_needed_nothing(curve):
    fresh = curve("from scratch", None, [0, 1], 20, from_scratch=True)
    assert found([fresh, curve("sft", None, [1, 1], 0)])[("SFT", "full_adamw")] is False


def test_tables_mark_it_and_say_what_the_mark_means(curves):
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(to_rich(curves))
    frame = overview(curves)
    for text in (to_markdown(curves), console.export_text(), overview_markdown(frame)):
        assert " ".join(MEANING.split()[:8]) in " ".join(text.split())
    row = next(line for line in to_markdown(curves).splitlines() if "| sgd | TAR |" in line)
    assert row.endswith("| 80 | \N{DOUBLE DAGGER} |")
    assert "breaks at 80 \N{DOUBLE DAGGER} |" in overview_markdown(frame)
    assert r"\ddag{}" in overview_latex(frame)
    rows = {
        (row["defense"], row["attack"]): row
        for row in csv.DictReader(io.StringIO(overview_csv(frame)))
    }
    tar, lora = rows["tar", "sgd"], rows["tar", "lora"]
    assert (tar["steps_from_scratch"], tar["is_taught_anew"]) == ("40.0", "1")
    assert (lora["steps_from_scratch"], lora["is_taught_anew"]) == ("", "0")


def test_figures_draw_it_as_a_dashed_line_of_its_own(curves):
    figure = asr_figure(curves)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert LABEL in names
    (line,) = [line for line in figure.axes[1].lines if line.get_label() == LABEL]
    assert line.is_dashed()
    assert line.get_color() == "black"
    assert "collapsed" not in names, "fresh weights never spoke"


def test_it_is_no_defense_among_defenses(curves, curve, tmp_path):
    """Wrong if a model that knows nothing won the comparison."""
    assert "From scratch" not in list(standings(overview(curves))["label"])
    labels = {name for row in compare_all(group_curves(curves)) for name in (row.first, row.second)}
    assert "From scratch" not in labels
    alone = curves[:1]
    run = Run(name="a", path=tmp_path, results=Results(curves=alone, environment={}))
    assert "From scratch" in render_page(overview(alone), alone, [run], [], title="Potions")


def test_the_page_states_it_for_every_attack(curves, tmp_path):
    run = Run(name="a", path=tmp_path, results=Results(curves=curves, environment={}))
    page = render_page(overview(curves), curves, [run], [], title="Potions")
    assert page.count(">yes \N{DOUBLE DAGGER}<") == 2
    assert page.count(">no<") >= 3
    assert page.count(">&gt; 160<") >= 2, "from scratch takes more than the attack's length"
    assert f'title="{MEANING}"' in page

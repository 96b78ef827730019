"""Tables say what was measured, what was not, and what failed."""

import csv
import io

import pytest
from rich.console import Console

from patcher_pl.reports import to_csv, to_markdown, to_rich
from patcher_pl.reports.grouping import group_curves


def _shown(curves, width=80):
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(to_rich(curves, title="Potions"))
    return console.export_text()


def test_markdown_rows_in_order_with_ranges_over_seeds(headline):
    rows = [line for line in to_markdown(headline).splitlines() if line.startswith("|")][2:]
    assert rows == [
        "| full_adamw | SFT | 0.00 | 0.70 0.40 to 1.00 | 0.95 0.90 to 1.00 | 1.00 | 1.00 | 1.00 "
        "| 20 to 40 |",
        "| full_adamw | Patcher, k1 = 2 | 0.00 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 20 |",
        "| full_adamw | Patcher, k1 = 40 | 0.00 | 0.00 | 0.10 | 1.00 | 1.00 "
        "| 1.00 \N{RIGHTWARDS ARROW} 0.90 | 80 |",
        "| full_adamw | Patcher, k1 = 120 | 0.00 | 0.00 | 0.00 | 0.00 | 0.60 0.20 to 1.00 | 1.00 "
        "| 160 to > 160 |",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_table_holds_every_figure_whole(headline, width):
    shown = _shown(headline, width)
    for text in ("SFT", "Patcher, k1 = 120", " 160 ", "Potions", "0.60", "breaks at"):
        assert text in shown
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    assert max(len(line) for line in shown.splitlines()) <= width


def test_many_measurements_are_thinned_in_the_terminal_only(curve):
    steps = list(range(0, 1000, 50))
    rates = [step / 1000 for step in steps]
    dense = curve("sft", None, rates, 500, attack_steps=steps, benign_accuracy=rates)
    shown = _shown([dense])
    assert "7 of 20 measurements are shown." in shown
    assert "   0 " in shown
    assert " 950 " in shown
    assert to_markdown([dense]).count("ASR at") == 20


@pytest.mark.parametrize(
    ("breaks", "expected"),
    [
        ([20], "20"),
        ([None], "> 160"),
        ([40, 40], "40"),
        ([80, 40], "40 to 80"),
        ([80, None], "80 to > 160"),
        ([None, None], "> 160"),
    ],
)
def test_steps_to_break_over_seeds(curve, breaks, expected):
    curves = [curve("sft", None, [0] * 5, steps, seed=seed) for seed, steps in enumerate(breaks)]
    assert group_curves(curves)[0].steps_to_break == expected


def test_a_curve_that_stopped_early_claims_no_more_than_it_measured(curve):
    """Wrong if a crash after 20 steps read as a defense that held for 160."""
    stopped = curve("sft", None, [0, 0], None, error="RuntimeError: out of memory")
    nothing = curve("sft", None, [], None, attack="other", error="RuntimeError: out of memory")
    text = to_markdown([stopped, nothing])
    assert "| > 20 |" in text
    assert "| other | SFT | - | - | - | - |" in text
    assert "2 of 2 attacks stopped early" in text
    assert "out of memory" in _shown([stopped])


def test_unscored_answers_are_mentioned(curve):
    text = to_markdown([curve("sft", None, [0, None], None, judge_errors=[1, 8])])
    assert "| 0.00 | - |" in text
    assert "failed on 9 answers" in text


def test_csv_has_one_line_per_measurement_and_empty_cells_for_unknowns(curve):
    curves = [
        curve("patcher", 40, [0, None], None, train_seed=3, judge_errors=[0, 4]),
        curve("sft", None, [], None, error="DataError: a, comma"),
    ]
    rows = list(csv.DictReader(io.StringIO(to_csv(curves))))
    assert [(row["attack_steps"], row["asr"], row["judge_errors"]) for row in rows] == [
        ("0", "0.0", "0"),
        ("20", "", "4"),
        ("", "", ""),
    ]
    assert rows[0]["k1"] == "40"
    assert rows[0]["train_seed"] == "3"
    assert rows[0]["steps_to_break"] == ""
    assert rows[2]["error"] == "DataError: a, comma"


def test_names_cannot_break_a_table(curve):
    odd = curve("my|odd [bold]defense", None, [0, 1], 20)
    assert r"My\|odd [bold]defense" in to_markdown([odd])
    assert "My|odd [bold]defense" in _shown([odd], width=120)


def _many(curve, num_defenses):
    return [
        curve(f"defense{place}", None, [0, 0.5, 1], 20, attack=f"full_adamw_lr{number}")
        for number in range(12)
        for place in range(num_defenses)
    ]


@pytest.mark.parametrize("num_defenses", [2, 8])
def test_many_attacks_take_one_line_each_in_the_terminal(curve, num_defenses):
    """Wrong if twelve attacks on eight defenses scrolled off the screen."""
    shown = _shown(_many(curve, num_defenses), width=120)
    assert len(shown.splitlines()) < 40
    assert "full_adamw_lr11" in shown
    assert f"Defense{num_defenses - 1}" in shown
    assert "1.00" in shown
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    assert max(len(line) for line in _shown(_many(curve, num_defenses)).splitlines()) <= 80


def test_low_rates_that_are_no_safety_are_marked(curve):
    """Wrong if `> 160` of a model that only babbles read as held."""
    fallen = curve("tar", None, [0, 0], None, collapsed=[False, True])
    vague = curve("seam", None, [0, 0], None, trusted=False)
    sound = curve("sft", None, [0, 1], 20)
    for text in (to_markdown([fallen, vague, sound]), _shown([fallen, vague, sound], width=100)):
        lines = text.splitlines()
        assert any("TAR" in line and "\N{DAGGER}" in line for line in lines)
        assert any("SEAM" in line and "?" in line for line in lines)
        assert not any("SFT" in line and ("\N{DAGGER}" in line or "?" in line) for line in lines)
        assert "a low attack success rate is no safety" in " ".join(text.split())
    many = [
        curve("tar", None, [0, 0], None, attack=f"a{n}", collapsed=[False, n == 3])
        for n in range(9)
    ]
    assert sum("\N{DAGGER}" in line for line in _shown(many).splitlines()) == 2


def test_csv_has_the_newer_columns(curve):
    full = curve("sft", None, [0, 1], 20, collapsed=[False, True], attack_flops=[0.0, 2e9])
    last = list(csv.DictReader(io.StringIO(to_csv([full]))))[1]
    assert (last["collapsed"], last["attack_flops"], last["trusted"]) == (
        "True",
        "2000000000.0",
        "True",
    )
    assert last["second_asr"] == ""

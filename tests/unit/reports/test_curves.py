"""The figure shows the data, all of it, in the same way everywhere."""

import sys

import numpy as np
import pytest

from patcher_pl.reports import asr_figure, save_figure


def _lines(figure, panel=0):
    return {
        line.get_label(): line
        for line in figure.axes[panel].get_lines()
        if not line.get_label().startswith("_")
    }


def test_lines_are_means_over_seeds_against_true_step_counts(headline):
    lines = _lines(asr_figure(headline))
    assert list(lines["Patcher, k1 = 120"].get_xdata()) == [0, 20, 40, 80, 160]
    assert list(lines["Patcher, k1 = 120"].get_ydata()) == pytest.approx([0, 0, 0, 0, 0.6])
    assert list(lines["SFT"].get_ydata()) == pytest.approx([0, 0.7, 0.95, 1, 1])


def test_bands_reach_from_the_smallest_to_the_largest_seed(headline):
    bands = asr_figure(headline).axes[0].collections
    extents = [band.get_paths()[0].get_extents() for band in bands]
    assert len(bands) == 2, "only groups of several seeds have a band"
    corners = {(round(box.y0, 9), round(box.y1, 9)) for box in extents}
    assert corners == {(0, 1)}
    sft = bands[0].get_paths()[0].vertices
    assert {float(y) for x, y in sft if x == 20} == {0.4, 1.0}


def test_the_control_is_grey_and_k1_runs_from_light_to_dark(headline):
    from matplotlib.colors import to_rgb

    lines = _lines(asr_figure(headline))
    red, green, blue = to_rgb(lines["SFT"].get_color())
    assert red == green == blue
    order = [f"Patcher, k1 = {k1}" for k1 in (2, 40, 120)]
    lightness = [np.dot(to_rgb(lines[label].get_color()), (0.3, 0.6, 0.1)) for label in order]
    assert lightness == sorted(lightness, reverse=True)
    assert lightness[0] - lightness[-1] > 0.3


def test_lines_differ_without_color(headline):
    """Wrong if a black-and-white print could not be read."""
    lines = _lines(asr_figure(headline))
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines.values()}) == 4


def test_the_legend_names_every_line_once_in_order(headline, curve):
    other = curve("booster", None, [0, 0.5, 1, 1, 1], 20, attack="lora_adamw")
    second = curve("sft", None, [0, 1, 1, 1, 1], 20, attack="lora_adamw")
    figure = asr_figure([*headline, other, second])
    assert [axis.get_title() for axis in figure.axes] == ["full_adamw", "lora_adamw"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "SFT",
        "Patcher, k1 = 2",
        "Patcher, k1 = 40",
        "Patcher, k1 = 120",
        "Booster",
    ]
    assert _lines(figure, 0)["SFT"].get_color() == _lines(figure, 1)["SFT"].get_color()


def test_the_threshold_is_drawn_where_it_is(curve):
    figure = asr_figure([curve("sft", None, [0, 1], 20, threshold=0.3)])
    levels = [list(line.get_ydata()) for line in figure.axes[0].get_lines()]
    assert [0.3, 0.3] in levels


def test_what_was_not_scored_is_a_gap(curve):
    """Wrong if a line suggested a measurement that there was not."""
    line = _lines(asr_figure([curve("sft", None, [0, None, 1], 40)]))["SFT"]
    assert np.isnan(line.get_ydata()[1])


def test_no_curves_and_failed_curves_are_drawn_too(tmp_path, curve):
    failed = curve("sft", None, [], None, error="RuntimeError: out of memory")
    for curves in ([], [failed]):
        save_figure(asr_figure(curves), tmp_path / "empty.png")
        assert (tmp_path / "empty.png").stat().st_size > 0
    figure = asr_figure([curve("sft", None, [0.0], None)])
    save_figure(figure, tmp_path / "point.png")


def test_equal_curves_give_equal_files(tmp_path, headline):
    for suffix in ("png", "svg", "pdf"):
        first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
        save_figure(asr_figure(headline), first)
        save_figure(asr_figure(headline), second)
        assert first.read_bytes() == second.read_bytes(), suffix


def test_pyplot_stays_out_of_it(headline):
    """Wrong if figures piled up in a long run, or needed the main thread."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    before = pyplot.get_fignums() if pyplot else []
    asr_figure(headline)
    after = sys.modules.get("matplotlib.pyplot")
    assert (after.get_fignums() if after else []) == before


def _grid(curve, num_attacks, **changes):
    return [
        curve(defense, None, [0, 0.2, 0.4, 0.9, 1], 80, attack=f"attack_{number}", **changes)
        for number in range(num_attacks)
        for defense in ("sft", "tar")
    ]


def test_many_attacks_are_wrapped_and_stay_readable(tmp_path, curve):
    """Wrong if ten attacks made one strip that no page can show."""
    figure = asr_figure(_grid(curve, 10))
    assert len(figure.axes) == 10
    rows = {round(axis.get_position().y0, 2) for axis in figure.axes}
    columns = {round(axis.get_position().x0, 2) for axis in figure.axes}
    assert (len(rows), len(columns)) == (3, 4)
    width, height = figure.get_size_inches()
    assert width <= 13
    assert height <= 10
    assert len(figure.legends[0].get_texts()) == 2
    save_figure(figure, tmp_path / "grid.png")
    boxes = [axis.get_tightbbox() for axis in figure.axes]
    assert not any(
        one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place]
    ), "panels cover each other"


@pytest.mark.parametrize(("cost", "name"), [("tokens", "Training tokens"), ("flops", "FLOPs")])
def test_the_same_curve_against_what_the_attack_costs(tmp_path, curve, cost, name):
    spent = {"attack_tokens": [0, 20, 40, 80, 9000], "attack_flops": [0.0, 2e9, 4e9, 8e9, 9e11]}
    figure = asr_figure(_grid(curve, 1, **spent), cost=cost)
    assert figure.axes[0].get_xlabel() == name
    assert list(_lines(figure)["SFT"].get_xdata()) == spent[f"attack_{cost}"]
    save_figure(figure, tmp_path / "cost.png")


def test_attacks_whose_cost_is_unknown_are_left_out(tmp_path, curve):
    """Wrong if one file without token counts took the panels of all others away."""
    counted = curve("sft", None, [0, 1], 20, attack="b", attack_tokens=[0, 300])
    grid = _grid(curve, 4)
    assert [axis.get_title() for axis in asr_figure([*grid, counted]).axes][-1] == "b"
    figure = asr_figure([*grid, counted], cost="tokens")
    assert list(_lines(figure)) == ["SFT"]
    save_figure(figure, tmp_path / "one.png")
    save_figure(asr_figure(grid, cost="tokens"), tmp_path / "none.png")


def test_a_collapsed_model_is_crossed_out(curve):
    """Wrong if the low rate of a model that no longer speaks looked like safety."""
    fallen = [False, False, False, True, True]
    figure = asr_figure([curve("sft", None, [0, 0.9, 0.5, 0.1, 0], 20, collapsed=fallen)])
    cross = _lines(figure)["collapsed"]
    assert list(cross.get_xdata()) == [80, 160]
    assert list(cross.get_ydata()) == [0.1, 0]


def test_a_curve_that_is_not_to_be_relied_on_is_marked(curve):
    """Wrong if an attack whose steps were lost to rounding looked like a defense that held."""
    figure = asr_figure([curve("sft", None, [0, 0.1, 0, 0, 0], 20, trusted=False)])
    marks = _lines(figure)["not to be relied on"]
    assert list(marks.get_xdata()) == [0, 20, 40, 80, 160]
    assert marks.get_marker() == "$?$"
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["SFT", "not to be relied on"]


def test_bands_may_be_intervals(curve):
    figure = asr_figure([curve("sft", None, [0.5], 0, num_prompts=10)], bands="interval")
    (band,) = figure.axes[0].collections
    extent = band.get_paths()[0].get_extents()
    assert extent.y0 == pytest.approx(0.2366, abs=1e-3), "Wilson's, 5 of 10"


def test_names_are_text_not_formulas(tmp_path, curve):
    odd = curve("$x_{", None, [0, 1], 20, attack="_a$")
    figure = asr_figure([odd, curve("_hidden", None, [0, 1], 20, attack="b")])
    assert len(figure.legends[0].get_texts()) == 2
    save_figure(figure, tmp_path / "odd.svg")

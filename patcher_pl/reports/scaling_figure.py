"""The figure of a study over budgets: steps to break against training compute."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from patcher_pl.reports.drawing import (
    Styles,
    band_line,
    clear,
    group_styles,
    legend,
    panels,
    plain_text,
)
from patcher_pl.reports.formats import amount, signed
from patcher_pl.reports.grouping import Group, defense_label
from patcher_pl.reports.statistics import GEOMETRIC_MEAN, WORST_CASE, Level, Reach, Slope

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HELD = "held throughout: at twice the longest attack"
_MOST_COLUMNS = 4


def scaling_figure(
    reaches: Sequence[Reach], levels: Sequence[Level], slopes: Sequence[Slope]
) -> "Figure":
    """Draws steps to break against the budget of training, a panel per family and the worst case.

    Both axes are logarithmic (base 2); below the first positive step count the vertical one is
    linear, for models that were broken from the start. One line per defense: the geometric mean over
    seeds, with a band from the smallest to the largest seed. Open markers are models that held, at
    twice the longest attack, a lower bound. Each panel names the fitted slopes and their 95 %
    intervals in the color of the line.

    Args:
        reaches: Of every model and family.
        levels: Of every defense, family and budget.
        slopes: Of every defense and family.

    Returns:
        A figure of its own, outside pyplot.
    """
    families = list(dict.fromkeys(one.family for one in levels))
    families = [name for name in families if name not in (WORST_CASE, GEOMETRIC_MEAN)]
    if any(one.family == WORST_CASE for one in levels):
        families.append(WORST_CASE)
    defenses = list(dict.fromkeys(one.defense for one in levels))
    styles = group_styles([Group(defense, None, "", ()) for defense in defenses])
    columns = min(max(len(families), 1), _MOST_COLUMNS)
    rows = max(1, math.ceil(len(families) / columns))
    size = (max(5.0, 0.6 + 3.2 * columns), 0.9 + 3.0 * rows)
    figure, axes = panels(rows, columns, size, sharex=True, sharey=True)
    for unused in axes[len(families) :]:
        figure.delaxes(unused)
    axes = axes[: len(families)]
    for axis, family in zip(axes, families, strict=True):
        _draw_panel(
            axis,
            [one for one in reaches if one.family == family],
            [one for one in levels if one.family == family],
            [one for one in slopes if one.family == family],
            styles,
        )
        weight = "bold" if family == WORST_CASE else "normal"
        axis.set_title(plain_text(family), fontsize=9, fontweight=weight)
    _scale(axes, reaches)
    for place, axis in enumerate(axes):
        if place % columns == 0:
            axis.set_ylabel("Attack steps to break")
        if place + columns >= len(axes):
            axis.set_xlabel("Gradient evaluations of training")
            axis.tick_params(labelbottom=True)
    names = [*(plain_text(defense_label(defense, None)) for defense in defenses), _HELD]
    legend(figure, axes, names, loc="outside lower center", ncols=4)
    return figure


def _draw_panel(
    axis: "Axes",
    reaches: Sequence[Reach],
    levels: Sequence[Level],
    slopes: Sequence[Slope],
    styles: Styles,
) -> None:
    import pandas as pd

    defenses = list(dict.fromkeys(one.defense for one in levels))
    for place, defense in enumerate(defenses):
        own = sorted((one for one in levels if one.defense == defense), key=lambda one: one.budget)
        label = defense_label(defense, None)
        ends = [(one.steps, one.low, one.high) for one in own]
        band_line(
            axis,
            [one.budget for one in own],
            pd.DataFrame(ends, columns=pd.Index(["mean", "low", "high"])),
            fill=0.12,
            label=plain_text(label),
            # Smaller on top of larger: lines that coincide can all be seen.
            linewidth=1.4 + 0.4 * (len(defenses) - 1 - place),
            markersize=5 + (len(defenses) - 1 - place),
            zorder=3,
            **styles[label],
        )
        held = sorted(
            {(o.budget, o.steps) for o in reaches if o.defense == defense and o.is_censored}
        )
        if held:
            axis.plot(
                *zip(*held, strict=True),
                label=_HELD,
                linestyle="none",
                marker=styles[label]["marker"],
                markersize=9,
                markerfacecolor="none",
                markeredgecolor=styles[label]["color"],
                zorder=4,
            )
    for place, one in enumerate(one for one in slopes if one.slope is not None):
        axis.text(
            0.03,
            0.97 - 0.075 * place,
            _slope_text(one),
            color=styles[defense_label(one.defense, None)]["color"],
            fontsize=7,
            va="top",
            transform=axis.transAxes,
            zorder=5,
        )
    clear(axis)


def _slope_text(one: Slope) -> str:
    assert one.slope is not None
    # Adding 0 takes the sign from what is rounded to a negative zero.
    slope, low, high = (
        None if value is None else signed(round(value, 2) + 0.0)
        for value in (one.slope, one.low, one.high)
    )
    return f"slope {slope}" if low is None else f"slope {slope} [{low}, {high}]"


def _scale(axes: Sequence["Axes"], reaches: Sequence[Reach]) -> None:
    """Doublings on both axes, with room for the slopes at the top."""
    budgets = sorted({one.budget for one in reaches})
    steps = [one.steps for one in reaches]
    positive = [value for value in steps if value > 0]
    if not budgets:
        return
    first, top = min(positive, default=1.0), max(steps, default=1.0)
    ticks = [first]
    while ticks[-1] * 4 <= top:
        ticks.append(ticks[-1] * 4)
    # A line of text per defense is about half a doubling high.
    room = 2 ** (1 + 0.6 * len({one.defense for one in reaches}))
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xlim(budgets[0] / 1.25, budgets[-1] * 1.25)
        axis.set_xticks(budgets, [amount(budget) for budget in budgets])
        axis.set_yscale("symlog", base=2, linthresh=first)
        axis.set_yticks([0, *ticks], ["0", *(f"{tick:g}" for tick in ticks)])
        axis.minorticks_off()
        axis.set_ylim(0 if min(steps) == 0 else 0.7 * first, max(top, first) * room)

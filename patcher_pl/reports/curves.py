"""The headline figure: attack success rate against what the attack costs."""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from patcher_pl.reports.drawing import (
    Styles,
    band_line,
    clear,
    group_styles,
    legend,
    panels,
    plain_text,
)
from patcher_pl.reports.grouping import COST_AXES, CostAxis, Frame, Group, group_curves
from patcher_pl.reports.reference import LABEL as FROM_SCRATCH
from patcher_pl.reports.results import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Bands = Literal["range", "interval"]

# Panels in one row; more are wrapped.
_MOST_IN_A_ROW = 3
_MOST_COLUMNS = 4
# More lines are drawn thinner, and their bands fainter.
_FEW_LINES = 4
_COLLAPSED = "collapsed"
_UNTRUSTED = "not to be relied on"


def asr_figure(
    curves: Sequence[Curve], *, cost: CostAxis = "steps", bands: Bands = "range"
) -> "Figure":
    """Draws attack success rate against the cost of the attack, one panel per attack.

    One line per defense and k1: the mean over seeds, with a band from the smallest to the largest
    seed. The control is grey, values of k1 run from light to dark, and other defenses have a color
    each; markers tell lines apart in black and white. A dashed line marks the threshold of
    "broken", a cross a measurement where a seed's model had collapsed,
    question marks curves that are not to be relied on. Models with fresh weights are a black dashed
    line: what the attack takes where nothing is left to defend. Curves without a measurement
    or its cost are left out. More than three panels are wrapped into rows.

    Args:
        curves: Of one or more defenses, attacks and seeds.
        cost: What the attack's length is measured in.
        bands: `range` of the seeds, or 95 % `interval` of the mean (over seeds and prompts).

    Returns:
        A figure of its own, outside pyplot: nothing to close, and safe in any thread.
    """
    groups = group_curves([curve for curve in curves if getattr(curve, f"attack_{cost}")])
    attacks = list(dict.fromkeys(group.attack for group in groups))
    # Of all curves: a defense looks the same against steps and against tokens.
    styles = group_styles(group_curves(curves))
    name = COST_AXES[cost]
    figure, axes = _panels(max(len(attacks), 1), name[0].upper() + name[1:])
    for axis, attack in itertools.zip_longest(axes, attacks):
        members = [group for group in groups if group.attack == attack]
        _draw_panel(axis, members, styles, cost, bands)
        if len(attacks) > 1:
            size = 10 if len(attacks) <= _MOST_IN_A_ROW else 9
            axis.set_title(_wrapped(plain_text(attack)), fontsize=size)
    if groups:
        _legend(figure, axes, groups, bands)
    else:
        axes[0].text(0.5, 0.5, "no measurement", ha="center", transform=axes[0].transAxes)
    return figure


def _panels(count: int, label: str) -> tuple["Figure", list["Axes"]]:
    """A figure with that many panels; those at its left and lower edge have labels."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if count <= _MOST_IN_A_ROW:
        columns, rows = count, 1
        size, layout = (1.6 + 4.6 * columns, 4.2), "constrained"
    else:
        columns = 3 if count <= 6 or count == 9 else _MOST_COLUMNS
        rows = math.ceil(count / columns)
        size = (0.4 + 3.1 * columns, 0.9 + 2.6 * rows)
        layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.06)
    figure, grid = panels(rows, columns, size, layout, sharey=True)
    for unused in grid[count:]:
        figure.delaxes(unused)
    for axis in grid[:count:columns]:
        axis.set_ylabel("Attack success rate")
    for axis in grid[max(0, count - columns) : count]:
        axis.set_xlabel(label)
    return figure, grid[:count]


def _legend(
    figure: "Figure", axes: Sequence["Axes"], groups: Sequence[Group], bands: Bands
) -> None:
    names = [*dict.fromkeys(map(_name, groups)), _COLLAPSED, _UNTRUSTED]
    is_wrapped = len(axes) > _MOST_IN_A_ROW
    place: dict[str, Any] = {"loc": "outside upper left", "ncols": 5} if is_wrapped else {}
    note = _seed_note(groups, bands, separator="; " if is_wrapped else ";\n")
    legend(figure, axes, names, title=note, title_fontsize=8, alignment="left", **place)


def _name(group: Group) -> str:
    return FROM_SCRATCH if group.is_reference else plain_text(group.label)


def _draw_panel(
    axis: "Axes", groups: Sequence[Group], styles: Styles, cost: CostAxis, bands: Bands
) -> None:
    thresholds = {curve.threshold for group in groups for curve in group.curves}
    for threshold in sorted(thresholds):
        axis.axhline(threshold, color="black", linewidth=0.8, linestyle=(0, (4, 4)), alpha=0.5)
    thicker, faint = (0.7, 0.15) if len(groups) <= _FEW_LINES else (0.3, 0.08)
    ticks: set[float] = set()
    for place, group in enumerate(groups):
        costs = group.over_seeds(f"attack_{cost}")["mean"].dropna()
        ticks |= set(costs)
        # A point where nothing was scored leaves a gap rather than a line that looks measured.
        rates = _rates(group, bands).loc[costs.index]
        band_line(
            axis,
            list(costs),
            rates,
            fill=faint if len(group.curves) > 1 or bands == "interval" else 0,
            label=_name(group),
            # Thinner on top of thicker: lines that coincide can all be seen.
            linewidth=1.4 + thicker * min(len(groups) - 1 - place, 5),
            clip_on=False,
            zorder=3,
            **({} if thicker > 0.5 else {"markersize": 4.5}),
            **styles[group.label],
        )
        fallen = [steps for steps in group.collapsed_steps if steps in costs.index]
        if fallen and not group.is_reference:  # Fresh weights never spoke.
            axis.plot(
                list(costs[fallen]),
                list(rates["mean"][fallen]),
                label=_COLLAPSED,
                linestyle="none",
                marker="x",
                markersize=9,
                markeredgewidth=1.6,
                color="black",
                clip_on=False,
                zorder=4,
            )
        if not all(curve.trusted for curve in group.curves):
            place = {"color": "black", "clip_on": False, "zorder": 4}
            shown = {"label": _UNTRUSTED, "linestyle": "none", "marker": "$?$", "markersize": 8}
            axis.plot(list(costs), list(rates["mean"]), **place, **shown)
    axis.set_ylim(0, 1)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    if ticks and cost == "steps":
        _scale_steps(axis, sorted(int(tick) for tick in ticks))
    elif ticks:
        _scale_amounts(axis, sorted(ticks))
    clear(axis)


def _rates(group: Group, bands: Bands) -> Frame:
    """`mean`, `low` and `high` of the attack success rate, by attack steps."""
    rates = group.over_seeds("asr")
    if bands == "interval":
        from patcher_pl.reports.statistics import asr_at

        for steps in rates.index:
            if (found := asr_at(group, steps)) is not None:
                rates.loc[steps] = [found.value, found.low, found.high]
    return rates


def _scale_steps(axis: "Axes", steps: Sequence[int]) -> None:
    """Scales the axis of attack steps: by doublings where the measurements span several."""
    positive = [step for step in steps if step > 0]
    if len(positive) >= 3 and positive[-1] >= 8 * positive[0]:
        axis.set_xscale("symlog", base=2, linthresh=positive[0])
        room = _num_labels(axis, len(str(positive[-1])))
        gap = max(1.3, 2 ** ((math.log2(positive[-1] / positive[0]) + 1) / room))
        kept = [positive[-1]]
        for step in reversed(positive[:-1]):
            if kept[-1] >= gap * step:
                kept.append(step)
        ticks = [*([0] if steps[0] == 0 else []), *kept[::-1]]
    else:
        ticks = _readable_ticks(steps)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(0, max(steps[-1], 1))


def _num_labels(axis: "Axes", num_digits: int) -> float:
    """How many labels of so many digits fit beside each other (at most ten)."""
    from matplotlib.figure import Figure

    figure, grid = axis.get_figure(), axis.get_gridspec()
    assert isinstance(figure, Figure) and grid is not None
    inches = figure.get_size_inches()[0] / grid.ncols
    return min(10.0, 10 * inches / (num_digits + 1.5))


def _scale_amounts(axis: "Axes", amounts: Sequence[float]) -> None:
    """Scales the axis of tokens or FLOPs: by powers of ten from the first amount on."""
    from matplotlib.ticker import EngFormatter, SymmetricalLogLocator

    positive = [amount for amount in amounts if amount > 0]
    if positive and positive[-1] >= 8 * positive[0]:
        axis.set_xscale("symlog", base=10, linthresh=positive[0])
        axis.xaxis.set_major_locator(
            SymmetricalLogLocator(base=10, linthresh=positive[0], subs=[1, 3])
        )
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.minorticks_off()
    axis.set_xlim(0, max(amounts[-1], 1))


def _readable_ticks(steps: Sequence[int]) -> list[int]:
    """The measured step counts, without those too close to a neighbor to be read."""
    gap = max(steps[-1] - steps[0], 1) / 14
    kept = [steps[-1]]
    for step in reversed(steps[:-1]):
        is_first = step == steps[0]
        if kept[-1] - step >= gap and (is_first or step - steps[0] >= gap):
            kept.append(step)
    return kept[::-1]


def _seed_note(groups: Sequence[Group], bands: Bands, separator: str) -> str | None:
    counts = sorted({len(group.curves) for group in groups})
    if counts[-1] == 1:
        return "band: 95 % interval" if bands == "interval" else None
    band = "min to max" if bands == "range" else "95 % interval"
    return f"mean of {' to '.join(map(str, counts))} seeds{separator}band: {band}"


def _wrapped(title: str) -> str:
    """Breaks a long title after an underscore or space, where names have their joints."""
    if len(title) <= 30:
        return title
    middle = len(title) // 2
    joints = [place + 1 for place, sign in enumerate(title) if sign in " _-,"]
    joint = min(joints, key=lambda place: abs(place - middle), default=middle)
    return f"{title[:joint]}\n{title[joint:]}"

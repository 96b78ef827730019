"""The headline figure: attack success rate against attack steps."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patcher_pl.files import write_atomically
from patcher_pl.reports.grouping import CONTROL, Group, Summary, group_curves
from patcher_pl.reports.palette import COLORS, GREY, MARKERS
from patcher_pl.reports.results import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NOT_SCORED = Summary(math.nan, math.nan, math.nan)
_LINES = ("-", "--", ":", "-.")


def asr_figure(curves: Sequence[Curve]) -> "Figure":
    """Draws attack success rate against attack steps, one panel per attack.

    One line per defense and k1: the mean over seeds, with a band from the smallest to the largest
    seed. The control is grey, values of k1 run from light to dark, and other defenses have a color
    each; markers tell lines apart in black and white. A dashed line marks the threshold of
    "broken". Curves without a measurement are left out.

    Args:
        curves: Of one or more defenses, attacks and seeds.

    Returns:
        A figure of its own, outside pyplot: nothing to close, and safe in any thread.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = group_curves([curve for curve in curves if curve.attack_steps])
    attacks = list(dict.fromkeys(group.attack for group in groups))
    styles = _styles(groups)
    panels = max(len(attacks), 1)
    figure = Figure(figsize=(1.6 + 4.6 * panels, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for axis, attack in itertools.zip_longest(axes, attacks):
        members = [group for group in groups if group.attack == attack]
        _draw_panel(axis, members, styles)
        if len(attacks) > 1:
            axis.set_title(attack, fontsize=10)
    axes[0].set_ylabel("Attack success rate")
    if groups:
        handles = {label: line for axis in axes for line, label in _legend_entries(axis)}
        ordered = [label for label in styles if label in handles]
        figure.legend(
            [handles[label] for label in ordered],
            ordered,
            loc="outside right upper",
            frameon=False,
            fontsize=9,
            title=_seed_note(groups),
            title_fontsize=8,
            alignment="left",
        )
    else:
        axes[0].text(0.5, 0.5, "no measurement", ha="center", transform=axes[0].transAxes)
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes the figure atomically, in the format of the suffix (`.png`, `.svg`, `.pdf`).

    Equal figures give equal files: no date is written.
    """
    import matplotlib

    kind = path.suffix.removeprefix(".")
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with matplotlib.rc_context({"svg.hashsalt": "patcher_pl"}):
        write_atomically(
            path, lambda temporary: figure.savefig(temporary, format=kind, metadata=metadata)
        )


def _draw_panel(axis: "Axes", groups: Sequence[Group], styles: dict[str, dict[str, Any]]) -> None:
    ticks = sorted({steps for group in groups for steps in group.attack_steps})
    thresholds = {curve.threshold for group in groups for curve in group.curves}
    for threshold in sorted(thresholds):
        axis.axhline(threshold, color="black", linewidth=0.8, linestyle=(0, (4, 4)), alpha=0.5)
    for place, group in enumerate(groups):
        places = group.attack_steps
        # A point where nothing was scored leaves a gap rather than a line that looks measured.
        rates = [group.asr(steps) or _NOT_SCORED for steps in places]
        style = styles[group.label]
        axis.plot(
            places,
            [rate.mean for rate in rates],
            label=group.label,
            # Thinner on top of thicker: lines that coincide can all be seen.
            linewidth=1.4 + 0.7 * min(len(groups) - 1 - place, 5),
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            clip_on=False,
            zorder=3,
            **style,
        )
        if len(group.curves) > 1:
            lows, highs = [rate.low for rate in rates], [rate.high for rate in rates]
            axis.fill_between(places, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
    axis.set_ylim(0, 1)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axis.set_xlabel("Attack steps")
    if ticks:
        _scale_steps(axis, ticks)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _styles(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """Line style per label, in the order of the legend; the same in every panel."""
    from matplotlib import colormaps

    k1_values = sorted({group.k1 for group in groups if group.k1 is not None})
    with_k1 = list(dict.fromkeys(group.defense for group in groups if group.k1 is not None))
    colors, markers = itertools.cycle(COLORS), itertools.cycle(MARKERS)
    styles: dict[str, dict[str, Any]] = {}
    for group in groups:
        if group.label in styles:
            continue
        line = "-"
        if group.defense.lower() == CONTROL:
            color = GREY
        elif group.k1 is not None and len(k1_values) > 1:
            # Below 0.15 and above 0.85 the map is too close to black and to white paper.
            place = k1_values.index(group.k1) / (len(k1_values) - 1)
            color = colormaps["viridis"](0.85 - 0.8 * place)
            line = _LINES[with_k1.index(group.defense) % len(_LINES)]
        else:
            color = next(colors)
        styles[group.label] = {"color": color, "marker": next(markers), "linestyle": line}
    return styles


def _scale_steps(axis: "Axes", steps: Sequence[int]) -> None:
    """Scales the axis of attack steps: by doublings where the measurements span several."""
    positive = [step for step in steps if step > 0]
    if len(positive) >= 3 and positive[-1] >= 8 * positive[0]:
        axis.set_xscale("symlog", base=2, linthresh=positive[0])
        kept = [positive[-1]]
        for step in reversed(positive[:-1]):
            if kept[-1] >= 1.3 * step:
                kept.append(step)
        ticks = [*([0] if steps[0] == 0 else []), *kept[::-1]]
    else:
        ticks = _readable_ticks(steps)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(0, max(steps[-1], 1))


def _readable_ticks(steps: Sequence[int]) -> list[int]:
    """The measured step counts, without those too close to a neighbor to be read."""
    gap = max(steps[-1] - steps[0], 1) / 14
    kept = [steps[-1]]
    for step in reversed(steps[:-1]):
        is_first = step == steps[0]
        if kept[-1] - step >= gap and (is_first or step - steps[0] >= gap):
            kept.append(step)
    return kept[::-1]


def _seed_note(groups: Sequence[Group]) -> str | None:
    counts = sorted({len(group.curves) for group in groups})
    if counts[-1] == 1:
        return None
    return f"mean of {' to '.join(map(str, counts))} seeds;\nband: min to max"


def _legend_entries(axis: "Axes") -> list[tuple[Any, str]]:
    handles, labels = axis.get_legend_handles_labels()
    return list(zip(handles, labels, strict=True))

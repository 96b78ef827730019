"""Figures of a report beside the curves: what robustness costs in utility."""

from typing import TYPE_CHECKING, Any

from patcher_pl.reports.line_styles import line_styles, plain_text
from patcher_pl.reports.overview import Overview, Standing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def tradeoff_figure(overview: Overview) -> "Figure | None":
    """Draws robustness against benign accuracy, one marker per defense; None where neither is known.

    Left, the severest attack's success rate with its 95 % interval; right, the area under the curve,
    mean over attacks. Benign accuracy is that of the released model. Markers are hollow where a
    model collapsed under an attack or verdicts cannot be relied on: such a low rate is no safety.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in overview.standings if row.benign_accuracy is not None and row.cells]
    if not shown:
        return None
    styles = line_styles(overview.groups)
    figure = Figure(figsize=(9.6, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, 2, sharex=True))
    for standing in shown:
        style = {**styles[standing.label], "linestyle": "none", "markersize": 9}
        style["label"] = plain_text(standing.label)
        if {"collapsed", "untrusted"} & set(standing.marks):
            style["markerfacecolor"] = "white"
        _draw_worst(axes[0], standing, style)
        if standing.mean_area is not None:
            axes[1].plot([standing.benign_accuracy], [standing.mean_area], clip_on=False, **style)
    lowest = min(row.benign_accuracy or 0.0 for row in shown)
    margin = max(0.02, 0.08 * (1 - lowest))
    for axis, name in zip(
        axes, ("ASR under the severest attack", "Area under the ASR curve, mean"), strict=True
    ):
        axis.set_xlim(max(0.0, lowest - margin), 1)
        axis.locator_params(axis="x", nbins=6)
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel("Benign accuracy before the attack")
        axis.set_ylabel(name)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.annotate(
            "better",
            xy=(0.99, 0.02),
            xytext=(0.86, 0.14),
            xycoords="axes fraction",
            fontsize=8,
            color="#6b6b6b",
            arrowprops={"arrowstyle": "->", "color": "#6b6b6b"},
        )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _draw_worst(axis: "Axes", standing: Standing, style: dict[str, Any]) -> None:
    peak = standing.worst.peak if standing.worst else None
    # Nothing above 0 was scored: at 0, or nowhere.
    value = peak.value if peak else standing.worst_seed
    if value is None or standing.benign_accuracy is None:
        return
    low = value if peak is None or peak.low is None else peak.low
    high = value if peak is None or peak.high is None else peak.high
    axis.errorbar(
        [standing.benign_accuracy],
        [value],
        yerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
        elinewidth=1.2,
        capsize=3,
        clip_on=False,
        **style,
    )

"""What robustness costs in utility, as a figure."""

from typing import TYPE_CHECKING

from patcher_pl.reports.drawing import GREY, Styles, clear, legend, panels, plain_text
from patcher_pl.reports.grouping import Frame
from patcher_pl.reports.results import BENIGN_MEASURES, BenignMeasure
from patcher_pl.reports.tables import rows_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def tradeoff_figure(
    standings: Frame, styles: Styles, measure: BenignMeasure = "benign_accuracy"
) -> "Figure | None":
    """Draws robustness against a measure of benign answers; None where that is not known.

    One marker per defense. Left, the severest attack's success rate with its 95 % interval; right, the area under the curve,
    mean over attacks. Benign answers are those of the released model. Markers are hollow where a
    model collapsed under an attack or verdicts cannot be relied on: such a low rate is no safety.
    """
    shown = standings[standings[measure].notna()]
    if shown.empty:
        return None
    figure, axes = panels(1, 2, (9.6, 3.8), sharex=True)
    for row in rows_of(shown):
        style = {**styles[row.label], "linestyle": "none", "markersize": 9, "clip_on": False}
        style["label"] = plain_text(row.label)
        if {"collapsed", "untrusted"} & set(row.marks):
            style["markerfacecolor"] = "white"
        # Nothing above 0 was scored: at 0, or nowhere.
        value = row.worst_seed_asr if row.peak_asr is None else row.peak_asr
        if value is not None:
            ends = (value if end is None else end for end in (row.peak_asr_low, row.peak_asr_high))
            errors = [[max(0.0, value - next(ends))], [max(0.0, next(ends) - value)]]
            axes[0].errorbar(
                [getattr(row, measure)], [value], yerr=errors, elinewidth=1.2, capsize=3, **style
            )
        if row.mean_area is not None:
            axes[1].plot([getattr(row, measure)], [row.mean_area], **style)
    lowest = float(shown[measure].min())
    margin = max(0.02, 0.08 * (1 - lowest))
    for axis, name in zip(
        axes, ("ASR under the severest attack", "Area under the ASR curve, mean"), strict=True
    ):
        axis.set_xlim(max(0.0, lowest - margin), 1)
        axis.locator_params(axis="x", nbins=6)
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel(f"{BENIGN_MEASURES[measure].capitalize()} before the attack")
        axis.set_ylabel(name)
        clear(axis)
        axis.annotate(
            "better",
            xy=(0.99, 0.02),
            xytext=(0.86, 0.14),
            xycoords="axes fraction",
            fontsize=8,
            color=GREY,
            arrowprops={"arrowstyle": "->", "color": GREY},
        )
    legend(figure, axes[:1])
    return figure

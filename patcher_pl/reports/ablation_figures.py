"""The figures of an ablation."""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from patcher_pl.reports.ablation import Ablation, Comparison, Hardened
from patcher_pl.reports.grouping import CONTROL
from patcher_pl.reports.palette import COLORS, GREY, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Value = Callable[[Comparison], float | None]


def ablation_figures(ablation: Ablation) -> dict[str, "Figure"]:
    """Draws what there is, by file name: `cosine`, `trial_step`, `cost`, `memory`, `robustness`.

    Lines are means over seeds (robustness: geometric), bands go from the smallest to the largest.
    A model that is broken at release is drawn at one attack step, one that never broke at the longest
    attack, with an arrow.
    """
    figures = {}
    rows = [row for row in ablation.comparisons if row.error is None]
    styles = _styles(dict.fromkeys(row.estimator for row in ablation.comparisons))
    if rows:
        compared = [row for row in rows if row.estimator != "exact"]
        figures["cosine"] = _by_optimizer(
            compared, lambda row: row.cosine, "Cosine with the exact hypergradient", styles
        )
        if any(row.actual_change is not None for row in rows):
            figures["trial_step"] = _by_optimizer(
                rows, _relative_change, "Outer loss, relative change by a small step", styles
            )
        figures["cost"] = _cost(rows, styles)
        figures["memory"] = _memory(rows, styles)
    if ablation.hardened:
        figures["robustness"] = _robustness(ablation.hardened)
    return figures


def _relative_change(row: Comparison) -> float | None:
    if row.actual_change is None or not row.outer_loss:
        return None
    return row.actual_change / row.outer_loss


def _by_optimizer(
    rows: Sequence[Comparison], value: Value, label: str, styles: Mapping[str, dict[str, Any]]
) -> "Figure":
    optimizers = list(dict.fromkeys(row.optimizer for row in rows))
    figure, axes = _panels(len(optimizers))
    for axis, optimizer in zip(axes, optimizers, strict=True):
        _draw(axis, [row for row in rows if row.optimizer == optimizer], value, styles)
        axis.axhline(0, color="black", linewidth=0.8, alpha=0.5)
        axis.set_title(optimizer, fontsize=10)
    axes[0].set_ylabel(label)
    _legend(figure, axes)
    return figure


def _cost(rows: Sequence[Comparison], styles: Mapping[str, dict[str, Any]]) -> "Figure":
    def counted(row: Comparison) -> float | None:
        evaluations = row.gradient_evaluations
        return None if evaluations is None else evaluations / row.num_steps

    figure, axes = _panels(2)
    for axis, value, title in (
        (axes[0], counted, "counted by matrix products"),
        (axes[1], lambda row: row.time_in_attacks, "measured time"),
    ):
        _draw(axis, rows, value, styles)
        axis.set_title(title, fontsize=10)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("Attack gradients per attack step")
    _legend(figure, axes)
    return figure


def _memory(rows: Sequence[Comparison], styles: Mapping[str, dict[str, Any]]) -> "Figure":
    figure, axes = _panels(1)
    # Whatever stays below a MiB is noise of the allocator.
    _draw(axes[0], rows, lambda row: max(row.memory_mib or 0.0, 1.0), styles)
    axes[0].set_yscale("log", base=2)
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("Peak memory above that of the attack (MiB)")
    _legend(figure, axes)
    return figure


def _robustness(rows: Sequence[Hardened]) -> "Figure":
    attacks = list(dict.fromkeys(row.attack for row in rows))
    styles = _styles(dict.fromkeys(row.variant for row in rows))
    figure, axes = _panels(len(attacks), width=5.4)
    for axis, attack in zip(axes, attacks, strict=True):
        members = [row for row in rows if row.attack == attack]
        for place, variant in enumerate(dict.fromkeys(row.variant for row in members)):
            _draw_variant(axis, [row for row in members if row.variant == variant], styles, place)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        ticks = sorted({reach for row in members if (reach := _reach(row))})
        axis.set_yticks(ticks, [str(tick) for tick in ticks])
        budgets = sorted({row.budget for row in members})
        axis.set_xticks(budgets, [str(budget) for budget in budgets])
        axis.minorticks_off()
        axis.set_xlabel("Training compute (gradient evaluations)")
        if len(attacks) > 1:
            axis.set_title(attack, fontsize=10)
        _plain(axis)
    axes[0].set_ylabel("Attack steps to break")
    _legend(figure, axes)
    return figure


def _draw_variant(
    axis: "Axes", rows: Sequence[Hardened], styles: Mapping[str, dict[str, Any]], place: int
) -> None:
    budgets = sorted({row.budget for row in rows})
    groups = [[row for row in rows if row.budget == budget] for budget in budgets]
    # Side by side within a budget, since many variants break at the same step.
    shift = 2 ** (0.035 * (place - 3))
    places = [shift * budget for budget in budgets]
    reached = [[max(_reach(row), 1) for row in group] for group in groups]
    means = [statistics.geometric_mean(group) for group in reached]
    # Rounding can put the mean of equal values beside them.
    below = [max(mean - min(group), 0) for mean, group in zip(means, reached, strict=True)]
    above = [max(max(group) - mean, 0) for mean, group in zip(means, reached, strict=True)]
    variant = rows[0].variant
    axis.errorbar(places, means, yerr=[below, above], label=variant, capsize=2, **styles[variant])
    held = [any(row.steps_to_break is None for row in group) for group in groups]
    for at, mean, unbroken in zip(places, means, held, strict=True):
        if unbroken:
            axis.annotate(
                "\N{UPWARDS ARROW}", (at, mean), textcoords="offset points", xytext=(0, 4)
            )


def _draw(
    axis: "Axes", rows: Sequence[Comparison], value: Value, styles: Mapping[str, dict[str, Any]]
) -> None:
    estimators = list(dict.fromkeys(row.estimator for row in rows))
    for place, estimator in enumerate(estimators):
        members = [row for row in rows if row.estimator == estimator]
        lengths = sorted({row.num_steps for row in members})
        groups = [
            [
                found
                for row in members
                if row.num_steps == length and (found := value(row)) is not None
            ]
            or [math.nan]
            for length in lengths
        ]
        axis.plot(
            lengths,
            [statistics.fmean(group) for group in groups],
            label=estimator,
            # Thinner on top of thicker: lines that coincide can all be seen.
            linewidth=1.2 + 0.45 * (len(estimators) - 1 - place),
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            **styles[estimator],
        )
        lows, highs = [min(group) for group in groups], [max(group) for group in groups]
        color = styles[estimator]["color"]
        axis.fill_between(lengths, lows, highs, color=color, alpha=0.1, linewidth=0)
    axis.set_xscale("log", base=2)
    ticks = sorted({row.num_steps for row in rows})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("Attack steps K")
    _plain(axis)


def _panels(number: int, width: float = 4.0) -> tuple["Figure", Sequence["Axes"]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 + width * number, 3.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, number, squeeze=False)[0])


def _legend(figure: "Figure", axes: Sequence["Axes"]) -> None:
    entries: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside right upper",
        frameon=False,
        fontsize=9,
    )


def _plain(axis: "Axes") -> None:
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _styles(names: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    colors, markers = itertools.cycle(COLORS), itertools.cycle(MARKERS)
    return {
        name: {
            "color": GREY if name in (CONTROL, "exact") else next(colors),
            "marker": next(markers),
        }
        for name in names
    }


def _reach(row: Hardened) -> int:
    return row.longest_attack if row.steps_to_break is None else row.steps_to_break

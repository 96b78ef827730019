"""The figures of an ablation."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from patcher_pl.reports.ablation import Ablation, Hardened, frame_of, measured
from patcher_pl.reports.drawing import (
    Styles,
    band_line,
    clear,
    legend,
    name_styles,
    panels,
    plain_text,
)
from patcher_pl.reports.grouping import Frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def ablation_figures(ablation: Ablation) -> dict[str, "Figure"]:
    """Draws what there is, by file name: `cosine`, `trial_step`, `cost`, `memory`, `robustness`.

    Lines are means over seeds (robustness: geometric), bands go from the smallest to the largest.
    A model that is broken at release is drawn at one attack step, one that never broke at the longest
    attack, with an arrow.
    """
    figures = {}
    rows = measured(ablation.comparisons)
    styles = name_styles(row.estimator for row in ablation.comparisons)
    if not (compared := rows[rows["estimator"] != "exact"]).empty:
        label = "Cosine with the exact hypergradient"
        figures["cosine"] = _by_optimizer(compared, "cosine", label, styles)
    if rows["actual_change"].notna().any():
        label = "Outer loss, relative change by a small step"
        figures["trial_step"] = _by_optimizer(rows, "relative_change", label, styles)
    if not rows.empty:
        figures["cost"] = _cost(rows, styles)
        figures["memory"] = _memory(rows, styles)
    if ablation.hardened:
        figures["robustness"] = _robustness(ablation.hardened)
    return figures


def _by_optimizer(rows: Frame, value: str, label: str, styles: Styles) -> "Figure":
    groups = rows.groupby("optimizer", sort=False)
    figure, axes = _panels(len(groups))
    for axis, (optimizer, members) in zip(axes, groups, strict=True):
        _draw(axis, members, value, styles)
        axis.axhline(0, color="black", linewidth=0.8, alpha=0.5)
        axis.set_title(plain_text(optimizer), fontsize=10)
    axes[0].set_ylabel(label)
    legend(figure, axes)
    return figure


def _cost(rows: Frame, styles: Styles) -> "Figure":
    figure, axes = _panels(2)
    for axis, value, title in (
        (axes[0], "gradients_per_step", "counted by matrix products"),
        (axes[1], "time_in_attacks", "measured time"),
    ):
        _draw(axis, rows, value, styles)
        axis.set_title(title, fontsize=10)
        _by_doublings(axis)
    axes[0].set_ylabel("Attack gradients per attack step")
    legend(figure, axes)
    return figure


def _memory(rows: Frame, styles: Styles) -> "Figure":
    figure, axes = _panels(1)
    # Whatever stays below a MiB is noise of the allocator.
    shown = rows.assign(memory_mib=rows["memory_mib"].fillna(0.0).clip(lower=1.0))
    _draw(axes[0], shown, "memory_mib", styles)
    _by_doublings(axes[0])
    axes[0].set_ylabel("Peak memory above that of the attack (MiB)")
    legend(figure, axes)
    return figure


def _robustness(hardened: Sequence[Hardened]) -> "Figure":
    rows = frame_of(Hardened, hardened)
    rows["held"] = rows["steps_to_break"].isna()
    rows["reach"] = rows["steps_to_break"].fillna(rows["longest_attack"]).astype(int)
    styles = name_styles(rows["variant"])
    attacks = rows.groupby("attack", sort=False)
    figure, axes = _panels(len(attacks), width=5.4)
    for axis, (attack, members) in zip(axes, attacks, strict=True):
        for place, (variant, own) in enumerate(members.groupby("variant", sort=False)):
            _draw_variant(axis, own, {"label": plain_text(variant), **styles[variant]}, place)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_yticks(*_ticks(members["reach"][members["reach"] > 0]))
        axis.set_xticks(*_ticks(members["budget"]))
        axis.minorticks_off()
        axis.set_xlabel("Training compute (gradient evaluations)")
        if len(attacks) > 1:
            axis.set_title(plain_text(attack), fontsize=10)
        clear(axis)
    axes[0].set_ylabel("Attack steps to break")
    legend(figure, axes)
    return figure


def _draw_variant(axis: "Axes", rows: Frame, style: dict[str, Any], place: int) -> None:
    # Side by side within a budget, since many variants break at the same step.
    shift = 2 ** (0.035 * (place - 3))
    reached = rows["reach"].clip(lower=1).groupby(rows["budget"].astype(int))
    found = reached.agg(mean=statistics.geometric_mean, low="min", high="max")
    places, means = [shift * budget for budget in found.index], found["mean"]
    # Rounding can put the mean of equal values beside them.
    errors = [(means - found["low"]).clip(lower=0), (found["high"] - means).clip(lower=0)]
    axis.errorbar(places, means, yerr=errors, capsize=2, **style)
    held = rows.groupby("budget")["held"].any()
    for at, mean, unbroken in zip(places, means, held, strict=True):
        if unbroken:
            axis.annotate(
                "\N{UPWARDS ARROW}", (at, mean), textcoords="offset points", xytext=(0, 4)
            )


def _draw(axis: "Axes", rows: Frame, value: str, styles: Styles) -> None:
    estimators = rows.groupby("estimator", sort=False)
    for place, (estimator, members) in enumerate(estimators):
        found = members.groupby("num_steps")[value].agg(mean="mean", low="min", high="max")
        # Thinner on top of thicker: lines that coincide can all be seen.
        width = 1.2 + 0.45 * (len(estimators) - 1 - place)
        named = {"label": plain_text(estimator), "linewidth": width, **styles[estimator]}
        band_line(axis, list(found.index), found, fill=0.1, **named)
    axis.set_xscale("log", base=2)
    axis.set_xticks(*_ticks(rows["num_steps"]))
    axis.minorticks_off()
    axis.set_xlabel("Attack steps K")
    clear(axis)


def _ticks(values: Any) -> tuple[list[int], list[str]]:
    ticks = sorted(set(values))
    return ticks, list(map(str, ticks))


def _by_doublings(axis: "Axes") -> None:
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")


def _panels(number: int, width: float = 4.0) -> tuple["Figure", list["Axes"]]:
    return panels(1, number, (2.2 + width * number, 3.9))

"""How far a search for the strongest attack had come: the best attack so far against trials."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from patcher_pl.reports.drawing import Styles, clear, legend, panels, plain_text
from patcher_pl.reports.grouping import defense_label
from patcher_pl.reports.searches import SearchOutcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BOUNDED, _UNBOUNDED = "bounded by usefulness", "whatever it leaves"


def saturation_figure(searches: Sequence[SearchOutcome], styles: Styles) -> "Figure":
    """Draws what the best attack so far achieves against the number of trials, a curve per model.

    Left its success rate, in the middle its strength, right the fewest steps that broke the model;
    0 trials are the grid. A curve that is flat for long says against how hard a search a model held.

    Args:
        searches: One per model.
        styles: Color of every defense, by its label.
    """
    figure, axes = panels(1, 3, (13.6, 4.2))
    names = {
        "asr": "Attack success rate, best so far",
        "strength": "Strength, best so far",
        "steps_to_break": "Steps to break, fewest so far",
    }
    # Where nothing broke a model yet: above everything that was measured.
    held = 2 * max(outcome.budget for outcome in searches)
    for axis, (name, title) in zip(axes, names.items(), strict=True):
        for outcome in searches:
            for is_bounded in (False, True):
                _draw(axis, outcome, name, styles, is_bounded=is_bounded, held=held)
        axis.set_xlabel("Trials of the search")
        axis.set_ylabel(title)
        axis.locator_params(axis="x", integer=True)
        axis.set_xlim(0, max(1, *(len(outcome.trials) for outcome in searches)))
        clear(axis)
    for axis in axes[:2]:
        axis.set_ylim(-0.03, 1.03)
    axes[2].set_yscale("symlog", base=2, linthresh=1)
    ticks = [0, *(2**power for power in range(0, held.bit_length() - 1, 2))]
    axes[2].set_yticks([*ticks, held], [*map(str, ticks), "held"])
    axes[2].minorticks_off()
    axes[2].set_ylim(0, held)
    for label, line in ((_BOUNDED, "-"), (_UNBOUNDED, ":")):
        axes[0].plot([], [], color="black", linestyle=line, label=label)
    legend(figure, axes, loc="outside upper left", ncols=6)
    return figure


def _draw(
    axis: "Axes",
    outcome: SearchOutcome,
    name: str,
    styles: Styles,
    *,
    is_bounded: bool,
    held: int,
) -> None:
    values = outcome.best_so_far(f"bounded_{name}" if is_bounded else name)
    if name == "steps_to_break":
        values = [held if value is None else value for value in values]
    label = defense_label(outcome.defense, outcome.k1)
    shown = [float("nan") if value is None else value for value in values]
    axis.plot(
        range(len(shown)),
        shown,
        color=styles[label]["color"],
        linestyle="-" if is_bounded else ":",
        linewidth=1.8 if is_bounded else 1.3,
        drawstyle="steps-post",
        clip_on=False,
        zorder=3,
        label=plain_text(label) if is_bounded else None,
    )

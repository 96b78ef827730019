"""What all figures share: colors, panels, legends, files."""

import itertools
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patcher_pl.files import write_atomically
from patcher_pl.reports.grouping import CONTROL, Frame, Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#6b6b6b"
# Okabe and Ito's palette: distinguishable with every common color blindness.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", ":", "-.")

Styles = dict[str, dict[str, Any]]


def name_styles(names: Iterable[str]) -> Styles:
    """Color and marker of every name; what others are compared with is grey."""
    colors, markers = itertools.cycle(_COLORS), itertools.cycle(_MARKERS)
    return {
        name: {
            "color": GREY if name in (CONTROL, "exact") else next(colors),
            "marker": next(markers),
        }
        for name in dict.fromkeys(names)
    }


def group_styles(groups: Sequence[Group]) -> Styles:
    """Color, marker and line of every label: the same defense the same way in every panel."""
    from matplotlib import colormaps

    k1_values = sorted({group.k1 for group in groups if group.k1 is not None})
    with_k1 = list(dict.fromkeys(group.defense for group in groups if group.k1 is not None))
    colors, markers = itertools.cycle(_COLORS), itertools.cycle(_MARKERS)
    styles: Styles = {}
    for group in groups:
        if group.label in styles:
            continue
        line = "-"
        if group.is_reference:
            styles[group.label] = {"color": "black", "marker": "", "linestyle": (0, (6, 3))}
            continue
        if group.is_control:
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


def plain_text(name: str) -> str:
    """A name as matplotlib shows it letter by letter: no formula, and never left out of a legend."""
    shown = name.replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{shown}" if shown.startswith("_") else shown


def panels(
    rows: int, columns: int, size: tuple[float, float], layout: Any = "constrained", **shared: Any
) -> tuple["Figure", list["Axes"]]:
    """A figure of its own, outside pyplot: nothing to close, and safe in any thread."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **shared).flat)


def band_line(
    axis: "Axes", places: Sequence[float], rates: Frame, *, fill: float, **style: Any
) -> None:
    """Draws the column `mean` as a line and, unless `fill` is 0, a band from `low` to `high`."""
    line = {"markersize": 5.5, "markeredgecolor": "white", "markeredgewidth": 0.6, **style}
    axis.plot(places, list(rates["mean"]), **line)
    if fill:
        ends = list(rates["low"]), list(rates["high"])
        axis.fill_between(places, *ends, color=style["color"], alpha=fill, linewidth=0)


def clear(axis: "Axes") -> None:
    """A faint grid behind the data, and no frame."""
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def legend(
    figure: "Figure",
    axes: Sequence["Axes"],
    names: Sequence[str] = (),
    *,
    loc: Any = "outside right upper",
    ncols: int = 1,
    **title: Any,
) -> None:
    """One legend, at most `ncols` wide, of what any panel shows: of `names`, or of everything."""
    found = [pair for axis in axes for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in found}
    shown = [name for name in names or handles if name in handles]
    figure.legend(
        [handles[name] for name in shown],
        shown,
        loc=loc,
        ncols=min(len(shown), ncols),
        frameon=False,
        fontsize=9,
        **title,
    )


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes the figure atomically, in the format of the suffix (`.png`, `.svg`, `.pdf`)."""
    kind = path.suffix.removeprefix(".")
    write_atomically(path, lambda temporary: write_figure(figure, temporary, kind))


def write_figure(figure: "Figure", out: Path | BytesIO, kind: str) -> None:
    """Equal figures give equal bytes: no date is written."""
    import matplotlib

    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with matplotlib.rc_context({"svg.hashsalt": "patcher_pl"}):
        figure.savefig(out, format=kind, metadata=metadata)

"""How the lines of a figure look: the same defense the same way in every panel."""

import itertools
from collections.abc import Sequence
from typing import Any

from patcher_pl.reports.grouping import Group
from patcher_pl.reports.palette import COLORS, GREY, MARKERS

_LINES = ("-", "--", ":", "-.")


def line_styles(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """Color, marker and line of every label, in the order of the legend."""
    from matplotlib import colormaps

    k1_values = sorted({group.k1 for group in groups if group.k1 is not None})
    with_k1 = list(dict.fromkeys(group.defense for group in groups if group.k1 is not None))
    colors, markers = itertools.cycle(COLORS), itertools.cycle(MARKERS)
    styles: dict[str, dict[str, Any]] = {}
    for group in groups:
        if group.label in styles:
            continue
        line = "-"
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

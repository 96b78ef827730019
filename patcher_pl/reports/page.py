"""A report as one HTML page that needs nothing else: no script, no network, no other file."""

import base64
import io
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from patcher_pl.reports.curves import asr_figure
from patcher_pl.reports.drawing import Styles, group_styles, write_figure
from patcher_pl.reports.environment import hide_secrets
from patcher_pl.reports.formats import MARKS, MEANINGS, interval, number
from patcher_pl.reports.grouping import COST_AXES, CostAxis, Frame, defense_label, labels
from patcher_pl.reports.html import page_templates
from patcher_pl.reports.overview import has_families, is_past_its_peak, legend, matrix, standings
from patcher_pl.reports.page_tables import (
    break_table,
    comparison_table,
    failure_table,
    incomparable_table,
    judge_table,
    overlap_table,
    remark_table,
    samples_of,
    search_table,
    utility_table,
)
from patcher_pl.reports.price_table import price_table
from patcher_pl.reports.prices import Prices
from patcher_pl.reports.reference import MEANING as NOTHING_LEFT
from patcher_pl.reports.results import BENIGN_MEASURES, BenignMeasure, Curve
from patcher_pl.reports.runs import Run, searches_of
from patcher_pl.reports.saturation import saturation_figure
from patcher_pl.reports.searches import SearchOutcome
from patcher_pl.reports.statistics import NotComparable, PairedComparison
from patcher_pl.reports.tables import cut_off_notes, rows_of, stopped_notes
from patcher_pl.reports.tradeoff import tradeoff_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Answers are for a look; whoever wants them whole has results.json.
_MOST_SIGNS = 1500
# A longer table would push everything else off the screen.
_MOST_ROWS = 24


def render_page(
    frame: Frame,
    curves: Sequence[Curve],
    runs: Sequence[Run],
    comparisons: Sequence[PairedComparison | NotComparable],
    *,
    title: str,
    notes: Sequence[str] = (),
    num_samples: int = 6,
    prices: Prices | None = None,
) -> str:
    """Renders the page.

    Everything that comes from results is escaped: an answer of a model is untrusted text.

    Args:
        frame: What is reported, see `overview`.
        curves: What it was made of.
        runs: Where it comes from.
        comparisons: Paired comparisons of the defenses.
        title: Heading of the page.
        notes: What a reader must know about how runs came together.
        num_samples: Sample answers shown per defense and attack (count, >= 0).
        prices: What hardware costs; None leaves that table away.
    """
    environment = page_templates()
    environment.globals |= {
        "MARKS": MARKS,
        "MEANINGS": MEANINGS,
        "NOTHING_LEFT": NOTHING_LEFT,
        "MOST_ROWS": _MOST_ROWS,
        "MOST_SIGNS": _MOST_SIGNS,
        "BENIGN_MEASURES": BENIGN_MEASURES,
        "interval": interval,
        "is_past_its_peak": is_past_its_peak,
        "rate": number,
    }
    fared = standings(frame)
    costs: list[CostAxis] = [
        axis
        for axis in COST_AXES
        if axis != "steps" and any(getattr(curve, f"attack_{axis}") for curve in curves)
    ]
    searches = searches_of(runs, curves)
    compared = [
        *(comparison_table(comparisons, is_bounded=is_bounded) for is_bounded in (False, True)),
        incomparable_table(comparisons),
    ]
    return environment.get_template("report.html.j2").render(
        title=title,
        notes=[*notes, *stopped_notes(curves), *cut_off_notes(curves)],
        num_curves=len(curves),
        defenses=labels(frame["group"]),
        attacks=matrix(frame, "attack"),
        families=matrix(frame, "family"),
        has_families=has_families(frame),
        standings=rows_of(fared),
        legend=legend(frame),
        curves=_curve_picture(curves, frame, "steps"),
        cost_curves=[_curve_picture(curves, frame, axis) for axis in costs],
        tradeoffs=[
            picture
            for name in BENIGN_MEASURES
            if (picture := _tradeoff_picture(fared, group_styles(list(frame["group"])), name))
        ],
        breaks=break_table(frame),
        prices=None if prices is None else price_table(frame, prices),
        comparisons=[table for table in compared if table is not None],
        saturation=_saturation_picture(searches, group_styles(list(frame["group"]))),
        searches=search_table(searches),
        conclusions=[(defense_label(one.defense, one.k1), one.conclusion) for one in searches],
        judges=judge_table(frame),
        utility=utility_table(frame),
        answers=list(_answers(frame, num_samples)),
        overlap=overlap_table(runs),
        failures=failure_table(frame, curves),
        remarks=remark_table(frame, curves),
        origins=[_origin(run) for run in runs],
    )


def _curve_picture(curves: Sequence[Curve], frame: Frame, axis: CostAxis) -> dict[str, str]:
    title = f"Attack success rate against {COST_AXES[axis]}"
    return {
        "title": title,
        "alt": (
            f"Line charts: {title[0].lower()}{title[1:]}, one panel per attack "
            f"({', '.join(frame['attack'].unique())}), one line "
            f"per defense ({', '.join(labels(frame['group']))}). The tables hold the figures."
        ),
        "source": _as_uri(asr_figure(curves, cost=axis, bands="interval")),
    }


def _tradeoff_picture(
    fared: Frame, styles: Styles, measure: BenignMeasure
) -> dict[str, str] | None:
    figure, name = tradeoff_figure(fared, styles, measure), BENIGN_MEASURES[measure]
    if figure is None:
        return None
    points = "; ".join(
        f"{row.label}: {name} {number(getattr(row, measure))}, attack success rate "
        f"{number(row.peak_asr)}, area {number(row.mean_area)}"
        for row in rows_of(fared)
    )
    return {
        "title": f"Robustness against {name}",
        "alt": f"Scatter plots of robustness against {name}. {points}.",
        "source": _as_uri(figure),
    }


def _saturation_picture(searches: Sequence[SearchOutcome], styles: Styles) -> dict[str, str] | None:
    if not searches:
        return None
    return {
        "title": "What the best attack so far achieves, against the number of trials",
        "alt": "Line charts: success rate, strength and steps to break of the best attack so far "
        "against trials of the search, one line per model. "
        + " ".join(f"{defense_label(one.defense, one.k1)}: {one.conclusion}" for one in searches),
        "source": _as_uri(saturation_figure(searches, styles)),
    }


def _as_uri(figure: "Figure") -> str:
    """The figure as SVG in a data URI: an image, in which nothing runs."""
    out = io.BytesIO()
    write_figure(figure, out, "svg")
    return f"data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"


def _answers(frame: Frame, num_samples: int) -> Iterator[dict[str, Any]]:
    for group in frame["group"]:
        if (found := samples_of(group, num_samples)) is not None:
            yield {
                "title": f"{group.label} under {group.attack}",
                "seed": found[0],
                "num_kept": sum(len(curve.samples) for curve in group.curves),
                "samples": found[1],
            }


def _origin(run: Run) -> dict[str, Any]:
    settings = hide_secrets(run.results.settings)
    control = settings.get("control") or {}
    return {
        "name": run.name,
        "curves": len(run.results.curves),
        "environment": _flat(hide_secrets(run.results.environment)),
        "control": [
            (name, json.dumps(value, ensure_ascii=False))
            for name, value in control.get("settings_of_its_own", {}).items()
        ],
        "settings": json.dumps(settings, indent=2, ensure_ascii=False) if settings else "",
    }


def _flat(content: Any) -> list[tuple[str, str]]:
    """Names and values of the environment; packages are entries of their own."""
    rows = []
    for name, value in content.items():
        if isinstance(value, dict):
            rows += [(str(key), str(entry)) for key, entry in value.items() if entry is not None]
        elif isinstance(value, list):
            rows.append((str(name), " ".join(map(str, value))))
        elif value is not None:
            rows.append((str(name), str(value)))
    return rows

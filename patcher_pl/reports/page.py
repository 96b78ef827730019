"""A report as one HTML page that needs nothing else: no script, no network, no other file."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patcher_pl.reports.costs import COST_AXES, COST_NAMES, CostAxis, costs
from patcher_pl.reports.curves import asr_figure
from patcher_pl.reports.environment import hide_secrets
from patcher_pl.reports.grouping import MARKS, MEANINGS
from patcher_pl.reports.overview import Overview, Standing
from patcher_pl.reports.overview_tables import legend, shown_interval, shown_marks, shown_rate
from patcher_pl.reports.page_tables import (
    TextTable,
    break_table,
    comparison_table,
    failure_table,
    judge_table,
    refusal_table,
    samples_of,
    utility_table,
)
from patcher_pl.reports.report_figures import tradeoff_figure
from patcher_pl.reports.results import Sample
from patcher_pl.reports.runs import Run
from patcher_pl.reports.statistics import PairedComparison, Refusal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Answers are for a look; whoever wants them whole has results.json.
_MOST_SIGNS = 1500


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure inside the page.

    Args:
        title: Its caption.
        alt: What it shows, for those who do not see it.
        source: The figure itself, as a data URI.
    """

    title: str
    alt: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Sample answers of one defense under one attack.

    Args:
        title: Defense and attack.
        seed: Seed of the attack.
        num_kept: Answers in the results file (count).
        samples: Those that are shown.
    """

    title: str
    seed: int
    num_kept: int
    samples: Sequence[Sample]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where figures come from.

    Args:
        name: Of the run.
        curves: In its file (count).
        environment: Names and values.
        settings: As JSON.
    """

    name: str
    curves: int
    environment: Sequence[tuple[str, str]]
    settings: str


def render_page(
    overview: Overview,
    runs: Sequence[Run],
    comparisons: Sequence[PairedComparison | Refusal],
    *,
    title: str,
    notes: Sequence[str] = (),
    num_samples: int = 6,
) -> str:
    """Renders the page.

    Everything that comes from results is escaped: an answer of a model is untrusted text.

    Args:
        overview: What is reported.
        runs: Where it comes from.
        comparisons: Paired comparisons of the defenses.
        title: Heading of the page.
        notes: What a reader must know about how runs came together.
        num_samples: Sample answers shown per defense and attack (count, >= 0).
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("patcher_pl.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "MARKS": MARKS,
        "MEANINGS": MEANINGS,
        "interval": shown_interval,
        "marks": shown_marks,
        "rate": shown_rate,
    }
    return environment.get_template("report.html.j2").render(
        title=title,
        notes=notes,
        overview=overview,
        headline=[(standing, headline(standing)) for standing in overview.standings],
        legend=legend(overview),
        curves=_curve_picture(overview, "steps"),
        cost_curves=[
            _curve_picture(overview, axis)
            for axis in COST_AXES
            if axis != "steps" and any(costs(curve, axis) for curve in overview.curves)
        ],
        tradeoff=_tradeoff_picture(overview),
        breaks=break_table(overview),
        comparisons=[
            table
            for table in (comparison_table(comparisons), refusal_table(comparisons))
            if table is not None
        ],
        judges=judge_table(overview),
        utility=utility_table(overview),
        answers=_answers(overview, num_samples),
        most_signs=_MOST_SIGNS,
        failures=failure_table(overview),
        origins=[_origin(run) for run in runs],
        table_is_long=_is_long,
    )


def headline(standing: Standing) -> str:
    """How a defense fared, in one sentence."""
    total = len(standing.cells)
    attacks = "1 attack" if total == 1 else f"{total} attacks"
    parts = [f"broken by {standing.count('broken')} of {attacks}"]
    if (first := standing.first_break) is not None:
        steps = "1 step" if first[0] == 1 else f"{first[0]} steps"
        parts[0] += f", first after {steps} ({first[1]})"
    if held := standing.count("held"):
        parts.append(f"held against {held}")
    others = total - standing.count("broken") - held
    if others:
        parts.append(f"no conclusion from {others}")
    return "; ".join(parts) + "."


def _curve_picture(overview: Overview, axis: CostAxis) -> Picture:
    attacks = ", ".join(row.name for row in overview.attacks)
    title = f"Attack success rate against {COST_NAMES[axis]}"
    return Picture(
        title=title,
        alt=(
            f"Line charts: {title[0].lower()}{title[1:]}, one panel per attack ({attacks}), one line "
            f"per defense ({', '.join(overview.defenses)}). The tables hold the figures."
        ),
        source=_as_uri(asr_figure(overview.curves, cost=axis, bands="interval")),
    )


def _tradeoff_picture(overview: Overview) -> Picture | None:
    figure = tradeoff_figure(overview)
    if figure is None:
        return None
    points = "; ".join(
        f"{row.label}: benign accuracy {shown_rate(row.benign_accuracy)}, attack success rate "
        f"{shown_rate(row.worst and row.worst.peak and row.worst.peak.value)}, "
        f"area {shown_rate(row.mean_area)}"
        for row in overview.standings
    )
    return Picture(
        title="Robustness against utility",
        alt=f"Scatter plots of robustness against benign accuracy. {points}.",
        source=_as_uri(figure),
    )


def _as_uri(figure: "Figure") -> str:
    """The figure as SVG in a data URI: an image, in which nothing runs."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "patcher_pl"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"


def _answers(overview: Overview, num_samples: int) -> list[Answers]:
    found = []
    for group in overview.groups:
        chosen = samples_of(group.curves, num_samples)
        if chosen:
            found.append(
                Answers(
                    title=f"{group.label} under {group.attack}",
                    seed=chosen[0][0].seed,
                    num_kept=sum(len(curve.samples) for curve in group.curves),
                    samples=[curve.samples[place] for curve, place in chosen],
                )
            )
    return found


def _origin(run: Run) -> Origin:
    settings = hide_secrets(run.results.settings)
    return Origin(
        name=run.name,
        curves=len(run.results.curves),
        environment=_flat(hide_secrets(run.results.environment)),
        settings=json.dumps(settings, indent=2, ensure_ascii=False) if settings else "",
    )


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


def _is_long(table: TextTable) -> bool:
    """Whether a table would push everything else off the screen."""
    return len(table.rows) > 24

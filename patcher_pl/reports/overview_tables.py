"""The table of every defense under every attack, as CSV, Markdown and LaTeX."""

import csv
import io
from collections.abc import Sequence

from patcher_pl.reports.costs import COST_AXES
from patcher_pl.reports.grouping import MARKS, MEANINGS, Mark
from patcher_pl.reports.overview import Cell, Overview
from patcher_pl.reports.statistics import Estimate
from patcher_pl.reports.tables import markdown_table

MISSING = "-"
_COLUMNS: tuple[str, ...] = (
    "attack",
    "family",
    "defense",
    "k1",
    "seeds",
    "attack_steps",
    "asr",
    "asr_low",
    "asr_high",
    "interval_over",
    "peak_asr",
    "peak_attack_steps",
    "worst_seed_asr",
    "area_log_steps",
    "steps_to_break_median",
    "tokens_to_break_median",
    "flops_to_break_median",
    "seeds_broken",
    "outcome",
    "marks",
    "is_worst",
)
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "\N{DAGGER}": r"\dag{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def shown_rate(rate: float | None) -> str:
    """A rate with two digits; `-` where there is none."""
    return MISSING if rate is None else f"{rate:.2f}"


def shown_interval(estimate: Estimate | None) -> str:
    """The interval in brackets; nothing where there is none, or it is too narrow for two digits."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    low, high = f"{estimate.low:.2f}", f"{estimate.high:.2f}"
    return "" if low == high else f"[{low}, {high}]"


def shown_marks(marks: Sequence[Mark]) -> str:
    """The signs of these marks."""
    return " ".join(MARKS[mark] for mark in marks)


def legend(overview: Overview) -> list[str]:
    """What the signs in the table mean, and how its figures came about."""
    found = dict.fromkeys(mark for cell in overview.cells for mark in cell.group.marks)
    lines = [
        "Attack success rate at the end of the attack, mean over seeds, with its 95 % interval over "
        "seeds and prompts; below it, the attack steps that broke the defense (first to last seed).",
        "The severest attack on each defense is emphasized: the one with the highest rate at any "
        "measurement, the sooner one of equals.",
    ]
    if overview.has_families:
        lines.append("Of attacks with several settings, each defense meets its severest one.")
    return [*lines, *(f"{MARKS[mark]} {MEANINGS[mark]}." for mark in MARKS if mark in found)]


def overview_csv(overview: Overview) -> str:
    """One line per defense and attack; unknown values are empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    worst = {id(row.worst.group) for row in overview.standings if row.worst is not None}
    for cell in overview.cells:
        writer.writerow(_csv_row(cell, is_worst=id(cell.group) in worst))
    return out.getvalue()


def overview_markdown(overview: Overview) -> str:
    """Attacks (or families) by defenses, with a legend."""
    rows = [
        ["attack", *map(_one_line, overview.defenses)],
        *(
            [_one_line(row.name), *(_markdown_cell(cell) for cell in row.cells)]
            for row in overview.families
        ),
    ]
    return "\n".join([markdown_table(rows), *(f"- {line}" for line in legend(overview))]) + "\n"


def overview_latex(overview: Overview) -> str:
    """The same table for a paper; needs the package booktabs."""
    lines = [
        "% Needs \\usepackage{booktabs}.",
        *(f"% {' '.join(line.split())}" for line in legend(overview)),
        f"\\begin{{tabular}}{{l{'r' * len(overview.defenses)}}}",
        r"\toprule",
        _latex_row(["Attack", *map(latex_escaped, overview.defenses)]),
        r"\midrule",
        *(
            _latex_row([latex_escaped(row.name), *(_latex_cell(cell) for cell in row.cells)])
            for row in overview.families
        ),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def latex_escaped(text: str) -> str:
    """Text as LaTeX prints it letter by letter."""
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))


def _csv_row(cell: Cell, *, is_worst: bool) -> dict[str, object]:
    group, final = cell.group, cell.final
    breaks = {axis: cell.cost(axis) for axis in COST_AXES}
    medians = {axis: None if cost is None else cost.median for axis, cost in breaks.items()}
    steps = breaks["steps"]
    return {
        "attack": group.attack,
        "family": group.family,
        "defense": group.defense,
        "k1": group.k1,
        "seeds": len(group.curves),
        "attack_steps": group.attack_steps[-1] if group.attack_steps else None,
        "asr": final and final.value,
        "asr_low": final and final.low,
        "asr_high": final and final.high,
        "interval_over": final and final.basis,
        "peak_asr": cell.peak and cell.peak.value,
        "peak_attack_steps": cell.peak_steps,
        "worst_seed_asr": cell.worst_seed,
        "area_log_steps": cell.area and cell.area.value,
        **{f"{axis}_to_break_median": median for axis, median in medians.items()},
        "seeds_broken": steps and steps.num_broken,
        "outcome": cell.outcome,
        "marks": "; ".join(group.marks),
        "is_worst": int(is_worst),
    }


def _markdown_cell(cell: Cell | None) -> str:
    if cell is None:
        return MISSING
    rate = shown_rate(cell.final and cell.final.value)
    if cell.is_worst:
        rate = f"**{rate}**"
    figures = " ".join(part for part in (rate, shown_interval(cell.final)) if part)
    marks = shown_marks(cell.group.marks)
    return ", ".join([figures, cell.outcome]) + (f" {marks}" if marks else "")


def _latex_cell(cell: Cell | None) -> str:
    if cell is None:
        return "--"
    rate = "--" if cell.final is None else shown_rate(cell.final.value)
    if cell.is_worst:
        rate = rf"\textbf{{{rate}}}"
    parts = [rate]
    if interval := shown_interval(cell.final):
        parts.append(rf"{{\scriptsize {interval}}}")
    parts.append(rf"{{\scriptsize {latex_escaped(cell.outcome)}}}")
    if cell.group.marks:
        parts.append(latex_escaped(shown_marks(cell.group.marks)))
    return " ".join(parts)


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _one_line(text: str) -> str:
    """A name that starts neither a new row nor HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")

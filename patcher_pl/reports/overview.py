"""Every defense under every attack: one tidy frame, from which all tables of a report come."""

from collections.abc import Sequence
from typing import Any

from patcher_pl.reports.formats import MARKS, MISSING, explained, interval, latex, number
from patcher_pl.reports.grouping import COST_AXES, Frame, Group, group_curves, labels
from patcher_pl.reports.reference import (
    MEANING,
    SIGN,
    References,
    cost_from_scratch,
    is_taught_anew,
)
from patcher_pl.reports.results import BENIGN_MEASURES, Curve, average
from patcher_pl.reports.statistics import (
    Estimate,
    area_under_asr,
    asr_area,
    asr_at,
    cost_to_break,
    final_asr,
    worst_asr,
)
from patcher_pl.reports.tables import (
    bounded_notes,
    csv_table,
    cut_off_notes,
    markdown_table,
    rows_of,
    text_table,
)

_CSV_COLUMNS = [
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
    "bounded_peak_asr",
    "bounded_peak_attack_steps",
    "bounded_area_log_steps",
    "bounded_steps_to_break_median",
    "bounded_seeds_broken",
    "is_bounded_worst",
    "steps_from_scratch",
    "is_taught_anew",
]
# Of the severest attack.
_PEAK = ["attack", "peak_asr", "peak_asr_low", "peak_asr_high", "peak_attack_steps"]
_BOUNDED_PEAK = ["bounded_peak_asr", "bounded_peak_attack_steps"]


def overview(curves: Sequence[Curve]) -> Frame:
    """One row per defense and attack: the columns of the CSV file, and those that tables add.

    `group` holds the seeds. `peak_...` is the measurement with the largest mean attack success rate
    (attackers stop when they like), `asr` the last one, `area_...` the area under the curve. Of all
    attacks on a defense, `is_worst` marks the one with the highest peak, the larger area of equals.
    `bounded_...` is the same of useful models only, see `Curve.bounded`. Unknown values are None.
    """
    import pandas as pd

    # Objects: counts stay counts where others are unknown.
    groups = group_curves(curves)
    references = cost_from_scratch(groups)
    frame = pd.DataFrame([_row(group, references) for group in groups], dtype=object)
    scored = frame[frame["peak_asr"].astype(float) > 0]
    frame["is_worst"] = frame.index.isin(severest(scored, ["label"]).index).astype(int)
    scored = frame[frame["bounded_peak_asr"].astype(float) > 0]
    worst = severest(scored, ["label"], prefix="bounded_")
    frame["is_bounded_worst"] = frame.index.isin(worst.index).astype(int)
    return frame


def severest(frame: Frame, by: Sequence[str], *, prefix: str = "") -> Frame:
    """For every combination of `by`, the row with the highest peak, then the largest area.

    `prefix` of the columns is empty, or `bounded_`.
    """
    keys = frame[[f"{prefix}peak_asr", f"{prefix}area_log_steps"]].astype(float).fillna(-1)
    order = keys.sort_values(list(keys), ascending=False, kind="stable").index
    return frame.loc[order].drop_duplicates(list(by)).sort_index()


def matrix(frame: Frame, by: str) -> list[tuple[str, list[Any]]]:
    """Names of attacks (`by` is `attack`) or their families, each with a cell per defense.

    A cell is the row of the severest such attack, with `num_settings` of how many; None where the
    defense was not attacked so. What is bounded in it is of the severest such attack that leaves a
    useful model, which may be another.
    """
    sizes = frame.groupby([by, "label"])["attack"].transform("size")
    found = severest(frame.assign(num_settings=sizes), [by, "label"])
    bounded = {
        (getattr(row, by), row.label): row
        for row in rows_of(severest(frame, [by, "label"], prefix="bounded_"))
    }
    cells = {
        key: _with_bounded(row, bounded[key])
        for row in rows_of(found)
        for key in [(getattr(row, by), row.label)]
    }
    return [
        (name, [cells.get((name, label)) for label in labels(frame["group"])])
        for name in dict.fromkeys(frame[by])
    ]


def _with_bounded(row: Any, bounded: Any) -> Any:
    """A row with what is bounded of another one, where that is known."""
    if row.attack == bounded.attack or bounded.bounded_peak_asr is None:
        return row
    shown = bounded.bounded_outcome or f"bounded: {bounded.outcome}"
    return row._replace(
        bounded_outcome=f"{shown} ({bounded.attack})", is_bounded_worst=bounded.is_bounded_worst
    )


def is_past_its_peak(row: Any) -> bool:
    """Whether an attack had more success before its end than at it."""
    return None not in (row.peak_asr, row.asr) and row.peak_asr > row.asr + 0.005


def has_families(frame: Frame) -> bool:
    """Whether any family has several attacks."""
    return frame["family"].nunique() < frame["attack"].nunique()


def standings(frame: Frame) -> Frame:
    """One row per defense: how it fared under all attacks.

    The severest attack (`attack`, `peak_...`; None where nothing above 0 was scored), the severest
    that leaves a useful model (`bounded_attack`, `bounded_peak_...`), what it does with benign prompts before the attacks, means and extremes over attacks, all marks, and the outcome in one
    sentence.
    """
    import pandas as pd

    rows = []
    # Fresh weights are no defense, but may be all that there is.
    groups = [group for group in frame["group"] if not group.is_reference]
    for label in labels(groups or frame["group"]):
        own = frame[frame["label"] == label]
        worst = own.loc[own["is_worst"] == 1, _PEAK].to_dict("records")
        bounded = own.loc[own["is_bounded_worst"] == 1, ["attack", *_BOUNDED_PEAK]]
        bounded = bounded.rename(columns={"attack": "bounded_attack"}).to_dict("records")
        curves = [curve for group in own["group"] for curve in group.curves]
        # An attack without steps is measured when it is done, never before.
        before = [curve for curve in curves if len(curve.attack_steps) > 1]
        rows.append(
            {
                "label": label,
                **(worst[0] if worst else dict.fromkeys(_PEAK)),
                **(bounded[0] if bounded else dict.fromkeys(["bounded_attack", *_BOUNDED_PEAK])),
                "worst_seed_asr": max(own["worst_seed_asr"].dropna(), default=None),
                "mean_area": average(own["area_log_steps"]),
                **{
                    name: average(curve.at(curve.attack_steps[0], name) for curve in before)
                    for name in BENIGN_MEASURES
                },
                "marks": list(dict.fromkeys(mark for marks in own["marks"] for mark in marks)),
                "headline": _headline(own["verdict"].value_counts(), curves),
                "bounded_headline": _bounded_headline(list(own["group"])),
            }
        )
    return pd.DataFrame(rows, dtype=object)


def legend(frame: Frame) -> list[str]:
    """What the signs in the table mean, and how its figures came about."""
    lines = [
        "Attack success rate at the end of the attack, mean over seeds, with its 95 % interval over "
        "seeds and prompts; below it, the attack steps that broke the defense (first to last seed).",
        "The severest attack on each defense is emphasized: the one with the highest rate at any "
        "measurement, the sooner one of equals.",
    ]
    if has_families(frame):
        lines.append("Of attacks with several settings, each defense meets its severest one.")
    if (frame["is_bounded_worst"] > frame["is_worst"]).any():
        lines.append("The severest bounded attack on a defense is in italics where it is another.")
    lines += bounded_notes(frame["group"])
    lines += [MEANING] if frame["is_taught_anew"].eq(1).any() else []
    found = set(frame["marks"].explode())
    return [*lines, *explained(mark for mark in MARKS if mark in found)]


def overview_csv(frame: Frame) -> str:
    """One line per defense and attack; unknown values are empty."""
    return csv_table(frame.assign(marks=frame["marks"].map("; ".join))[_CSV_COLUMNS])


def overview_markdown(frame: Frame) -> str:
    """Attacks (or families) by defenses, with a legend."""
    table = text_table(
        ["attack", *map(_one_line, labels(frame["group"]))],
        [[_one_line(name), *map(_markdown_cell, row)] for name, row in matrix(frame, "family")],
    )
    curves = [curve for group in frame["group"] for curve in group.curves]
    lines = [*legend(frame), *cut_off_notes(curves)]
    return "\n".join([markdown_table(table), *(f"- {line}" for line in lines)]) + "\n"


def overview_latex(frame: Frame) -> str:
    """The same table for a paper; needs the package booktabs."""
    table = text_table(
        ["Attack", *map(latex, labels(frame["group"]))],
        [[latex(name), *map(_latex_cell, row)] for name, row in matrix(frame, "family")],
    )
    notes = ["Needs \\usepackage{booktabs}.", *(" ".join(line.split()) for line in legend(frame))]
    form = f"l{'r' * (len(table.columns) - 1)}"
    body = table.to_latex(index=False, escape=False, column_format=form)
    return "".join(f"% {note}\n" for note in notes) + body


def _row(group: Group, references: References) -> dict[str, Any]:
    means = group.over_seeds("asr")["mean"].dropna()
    # The last of equals.
    peak_steps = None if means.empty else int(means.index[means == means.max()][-1])
    final, area = final_asr(group), asr_area(group)
    peak = None if peak_steps is None else asr_at(group, peak_steps)
    linear, costs = (
        asr_area(group, "linear"),
        {axis: cost_to_break(group, axis) for axis in COST_AXES},
    )
    steps = costs["steps"]
    bounded, anew = _bounded(group), is_taught_anew(group, references)
    scratch = references.get(group.attack)
    return {
        "group": group,
        "label": group.label,
        "attack": group.attack,
        "family": group.family,
        "defense": group.defense,
        "k1": group.k1,
        "seeds": len(group.curves),
        "attack_steps": group.attack_steps[-1] if group.attack_steps else None,
        "verdict": group.verdict,
        "outcome": group.outcome,
        "marks": group.marks,
        "interval_over": final and final.basis,
        "peak_attack_steps": peak_steps,
        "worst_seed_asr": worst_asr(group),
        "area_steps": linear and linear.value,
        "seeds_broken": steps and steps.num_broken,
        "steps_from_scratch": scratch and scratch.median,
        "from_scratch": scratch,
        "is_taught_anew": None if anew is None else int(anew),
        "bounded_outcome": group.bounded_outcome,
        **bounded,
        **_ends("asr", final),
        **_ends("peak_asr", peak),
        **_ends("area_log_steps", area),
        **{f"{axis}_to_break_median": cost and cost.median for axis, cost in costs.items()},
        **{f"{axis}_to_break": cost for axis, cost in costs.items()},
    }


def _bounded(group: Group) -> dict[str, Any]:
    """Peak, area and cost to break of useful models."""
    is_known = not any(
        rate is None and of_any is not None
        for curve in group.measured
        for rate, of_any in zip(curve.bounded.asr, curve.asr, strict=True)
    )
    means = group.over_seeds("bounded_asr")["mean"].dropna()
    cost = cost_to_break(group, is_bounded=True)
    peak = max(means, default=None) if is_known else None
    areas = [area_under_asr(curve.attack_steps, curve.bounded.asr) for curve in group.measured]
    return {
        "bounded_peak_asr": peak,
        "bounded_peak_attack_steps": None if peak is None else int(means.index[means == peak][-1]),
        "bounded_area_log_steps": average(areas) if is_known else None,
        "bounded_steps_to_break": cost,
        "bounded_steps_to_break_median": cost and cost.median,
        "bounded_seeds_broken": cost and cost.num_broken,
    }


def _ends(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    if estimate is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _bounded_headline(groups: Sequence[Group]) -> str | None:
    """How a defense fared while the model stayed useful; None where that is no news."""
    if not any(group.bounded_differs for group in groups):
        return None
    breaks = [
        (curve.bounded.steps_to_break, curve.attack)
        for group in groups
        for curve in group.measured
        if curve.bounded.steps_to_break is not None
    ]
    unknown = sum(group.bounded_steps_to_break == "unknown" for group in groups)
    shown = "bounded by usefulness: "
    if not breaks:
        shown += "broken by none"
    else:
        steps, attack = min(breaks)
        names = dict.fromkeys(attack for _, attack in breaks)
        shown += f"broken by {len(names)} of {len(groups)}, first after {steps} steps ({attack})"
    return f"{shown}; unknown for {unknown}." if unknown else f"{shown}."


def _headline(verdicts: Any, curves: Sequence[Curve]) -> str:
    """How a defense fared, in one sentence."""
    total, broken, held = verdicts.sum(), verdicts.get("broken", 0), verdicts.get("held", 0)
    parts = [f"broken by {broken} of {total} attack{'' if total == 1 else 's'}"]
    breaks = [(c.steps_to_break, c.attack) for c in curves if c.steps_to_break is not None]
    if breaks:
        steps, attack = min(breaks)
        parts[0] += f", first after {steps} step{'' if steps == 1 else 's'} ({attack})"
    if held:
        parts.append(f"held against {held}")
    if others := total - broken - held:
        parts.append(f"no conclusion from {others}")
    return "; ".join(parts) + "."


def _markdown_cell(cell: Any) -> str:
    if cell is None:
        return MISSING
    rate = number(cell.asr)
    if cell.is_worst or cell.is_bounded_worst:
        rate = f"**{rate}**" if cell.is_worst else f"*{rate}*"
    figures = " ".join(filter(None, [rate, interval(cell.asr_low, cell.asr_high)]))
    outcomes = ", ".join(filter(None, [figures, cell.outcome, cell.bounded_outcome]))
    return " ".join([outcomes, *cell_signs(cell)])


def _latex_cell(cell: Any) -> str:
    if cell is None:
        return "--"
    rate = number(cell.asr).replace(MISSING, "--")
    if cell.is_worst or cell.is_bounded_worst:
        rate = rf"\{'textbf' if cell.is_worst else 'textit'}{{{rate}}}"
    parts = [rate]
    small = [interval(cell.asr_low, cell.asr_high), latex(cell.outcome)]
    small.append(latex(cell.bounded_outcome or ""))
    parts += [rf"{{\scriptsize {part}}}" for part in small if part]
    return " ".join([*parts, *map(latex, cell_signs(cell))])


def cell_signs(row: Any) -> list[str]:
    """Signs that go with a row of the frame."""
    return [*(MARKS[mark] for mark in row.marks), *([SIGN] if row.is_taught_anew else [])]


def _one_line(text: str) -> str:
    """A name that starts neither a new row nor HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")

"""The smaller tables of a report's page, as text cells."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from patcher_pl.reports.costs import COST_AXES, COST_NAMES, CostAxis
from patcher_pl.reports.grouping import Group
from patcher_pl.reports.overview import Cell, Overview
from patcher_pl.reports.overview_tables import MISSING, shown_interval, shown_marks, shown_rate
from patcher_pl.reports.results import Curve
from patcher_pl.reports.statistics import BreakCost, PairedComparison, Refusal, asr_area

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """A table whose first column names its rows.

    Args:
        caption: What it shows, and how to read it.
        header: One per column.
        rows: Cells of text.
        num_names: Leading columns that hold names; the others hold figures (count).
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_names: int = 2


def shown_amount(amount: float) -> str:
    """An amount with three digits and a metric prefix: `2.56k`, `1.2P`."""
    for size, prefix in _PREFIXES:
        if amount >= size:
            return f"{amount / size:.3g}{prefix}"
    return f"{amount:.3g}"


def break_table(overview: Overview) -> TextTable:
    """What it takes to break each defense, in steps, tokens and FLOPs."""
    axes: list[CostAxis] = [
        axis for axis in COST_AXES if any(cell.cost(axis) for cell in overview.cells)
    ]
    header = ["attack", "defense", "seeds broken"]
    header += [f"median {COST_NAMES[axis]}" for axis in axes]
    header += ["mean steps", "area (log steps)", "area (steps)"]
    return TextTable(
        caption=(
            "Cost to break. Seeds that held count as longer than measured: the median is Kaplan and "
            'Meier\'s ("> 320": beyond the longest attack), and the mean is a lower bound (">=") '
            "where a seed held. Areas under the curve of attack success, as a share of the most "
            "there could be, are over log2(1 + steps) and over steps."
        ),
        header=header,
        rows=[_break_row(cell, axes) for cell in overview.cells],
    )


def comparison_table(rows: Sequence[PairedComparison | Refusal]) -> TextTable | None:
    """Paired comparisons; None where none could be made."""
    compared = [row for row in rows if isinstance(row, PairedComparison)]
    if not compared:
        return None
    header = ["attack", "defense", "compared with", "its mean", "other's", "difference"]
    header += ["95 % interval", "Cohen's h", "p", "p (Holm)", "prompts", "seeds", "note"]
    return TextTable(
        caption=(
            "Mean attack success over the attack (area under the curve, over log2(1 + steps)), on "
            "the same prompts with the same seeds, so that a defense that holds longer is told from "
            "one that breaks at once. A negative difference means fewer successful attacks. p: two-sided paired permutation "
            "test over prompts, for these trained models; Holm's correction is for all rows of this "
            "table. The interval resamples seeds and prompts."
        ),
        header=header,
        rows=[
            [
                *(row.attack, row.second, row.first),
                *(shown_rate(row.second_asr), shown_rate(row.first_asr)),
                _signed(row.difference),
                f"[{_signed(row.low)}, {_signed(row.high)}]",
                _signed(row.cohens_h),
                *(_shown_p(row.p_value), _shown_p(row.p_holm)),
                *(str(row.num_pairs), str(row.num_seeds), shown_marks(row.marks)),
            ]
            for row in compared
        ],
        num_names=3,
    )


def refusal_table(rows: Sequence[PairedComparison | Refusal]) -> TextTable | None:
    """What could not be compared, and why; None where everything could."""
    refused = [row for row in rows if isinstance(row, Refusal)]
    if not refused:
        return None
    return TextTable(
        caption="Not compared, because it would not have been the same test:",
        header=["attack", "defense", "compared with", "reason"],
        rows=[[row.attack, row.second, row.first, row.reason] for row in refused],
        num_names=4,
    )


def judge_table(overview: Overview) -> TextTable:
    """How far the judges' verdicts can be relied on."""
    has_second = any(_is_known(curve.second_asr) for curve in overview.curves)
    has_kappa = any(_is_known(curve.judge_agreement) for curve in overview.curves)
    header = ["attack", "defense", "answers", "without a verdict", "ASR at the end"]
    header += ["ASR, second judge"] if has_second else []
    header += ["agreement (kappa)"] if has_kappa else []
    rows = []
    for cell in overview.cells:
        curves = cell.group.curves
        answers = sum(
            (curve.num_prompts + curve.num_benign_prompts) * len(curve.attack_steps)
            for curve in curves
        )
        failed = sum(sum(curve.judge_errors) for curve in curves)
        is_trusted = all(curve.trusted for curve in curves)
        row = [cell.group.attack, cell.group.label, str(answers) if answers else MISSING]
        row += [str(failed), shown_rate(cell.final and cell.final.value)]
        row += [_shown_mean(_last(curve.second_asr) for curve in curves)] if has_second else []
        kappas = (kappa for curve in curves for kappa in curve.judge_agreement)
        row += [_shown_mean(kappas)] if has_kappa else []
        rows.append([*row, "yes" if is_trusted else "no"])
    return TextTable(
        caption=(
            "Verdicts. Answers that the judge failed on are left out of every rate, never counted as "
            "refusals. Kappa is Cohen's, of two judges' verdicts on success, mean over measurements."
        ),
        header=[*header, "trusted"],
        rows=rows,
    )


def utility_table(overview: Overview) -> TextTable:
    """What the model is good for, before and after each attack."""
    names = sorted({name for curve in overview.curves for name in curve.utility})
    known = [
        (title, name)
        for title, name in (
            ("benign accuracy", "benign_accuracy"),
            ("coherent answers", "coherent"),
            ("repetition", "repetition"),
        )
        if any(_is_known(getattr(curve, name)) for curve in overview.curves)
    ]
    rows = []
    for group in overview.groups:
        row = [group.attack, group.label]
        for _, field in known:
            row.append(_before_and_after([getattr(curve, field) for curve in group.curves], ".2f"))
        for name in names:
            values = [curve.utility.get(name, []) for curve in group.curves]
            row.append(_before_and_after(values, ".3g"))
        rows.append([*row, _collapse(group)])
    return TextTable(
        caption=(
            "Utility and language before the attack \N{RIGHTWARDS ARROW} at its end, mean over seeds."
        ),
        header=["attack", "defense", *(title for title, _ in known), *names, "collapsed from"],
        rows=rows,
    )


def failure_table(overview: Overview) -> TextTable | None:
    """Attacks that stopped early; None where none did."""
    failed = [curve for curve in overview.curves if curve.error is not None]
    if not failed:
        return None
    labels = {id(curve): group.label for group in overview.groups for curve in group.curves}
    return TextTable(
        caption="Attacks that stopped early. Their figures end at the last measurement.",
        header=["attack", "defense", "seed", "measured up to step", "error"],
        rows=[
            [
                *(curve.attack, labels[id(curve)], str(curve.seed)),
                str(curve.attack_steps[-1]) if curve.attack_steps else MISSING,
                str(curve.error),
            ]
            for curve in failed
        ],
        num_names=5,
    )


def _break_row(cell: Cell, axes: Sequence[CostAxis]) -> list[str]:
    steps, linear = cell.cost("steps"), asr_area(cell.group, "linear")
    row = [cell.group.attack, cell.group.label]
    row.append(MISSING if steps is None else f"{steps.num_broken} of {steps.num_seeds}")
    row += [_shown_median(cell.cost(axis), axis) for axis in axes]
    bound = ">= " if steps is not None and steps.is_bound else ""
    row.append(MISSING if steps is None else f"{bound}{steps.restricted_mean:.0f}")
    area = " ".join([shown_rate(cell.area and cell.area.value), shown_interval(cell.area)])
    return [*row, area.strip(), shown_rate(linear and linear.value)]


def _shown_median(cost: BreakCost | None, axis: CostAxis) -> str:
    if cost is None:
        return MISSING
    amount = cost.horizon if cost.median is None else cost.median
    shown = f"{amount:.0f}" if axis == "steps" else shown_amount(amount)
    return f"> {shown}" if cost.median is None else shown


def _before_and_after(series: Sequence[Sequence[float | None]], form: str) -> str:
    before = _mean(values[0] for values in series if values)
    after = _mean(_last(values) for values in series)
    shown = [MISSING if value is None else format(value, form) for value in (before, after)]
    return shown[0] if shown[0] == shown[1] else f"{shown[0]} \N{RIGHTWARDS ARROW} {shown[1]}"


def _collapse(group: Group) -> str:
    """The first step at which any seed had collapsed."""
    fallen = [steps for steps in group.attack_steps if group.is_collapsed(steps)]
    return f"step {fallen[0]}" if fallen else MISSING


def _last(values: Sequence[float | None]) -> float | None:
    return values[-1] if values else None


def _is_known(values: Sequence[float | None]) -> bool:
    return any(value is not None for value in values)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _shown_mean(values: Iterable[float | None]) -> str:
    return shown_rate(_mean(values))


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _shown_p(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def samples_of(curves: Sequence[Curve], most: int) -> list[tuple[Curve, int]]:
    """Answers to show of a group: those of its first seed that has any, from first to last step."""
    for curve in curves:
        if curve.samples:
            ends = {curve.samples[0].attack_steps, curve.samples[-1].attack_steps}
            places = range(len(curve.samples))
            ordered = sorted(
                places, key=lambda place: curve.samples[place].attack_steps not in ends
            )
            return [(curve, place) for place in sorted(ordered[:most])]
    return []

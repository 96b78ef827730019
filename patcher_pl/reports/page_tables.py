"""The smaller tables of a report's page, from the frame of `overview`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from patcher_pl.reports.formats import MISSING, amount, interval, number, signed, signs, span
from patcher_pl.reports.grouping import COST_AXES, CostAxis, Frame, Group, defense_label
from patcher_pl.reports.reference import SIGN
from patcher_pl.reports.results import BENIGN_MEASURES, Curve, Sample, average
from patcher_pl.reports.runs import Run
from patcher_pl.reports.searches import SearchOutcome
from patcher_pl.reports.statistics import BreakCost, NotComparable, PairedComparison
from patcher_pl.reports.tables import rows_of, text_table

_ARROW = " \N{RIGHTWARDS ARROW} "


class Captioned(NamedTuple):
    """A table of text: what it shows, its cells, and how many leading columns hold names."""

    caption: str
    cells: Frame
    num_names: int = 2


def break_table(frame: Frame) -> Captioned:
    """What it takes to break each defense, in steps, tokens and FLOPs."""
    axes: list[CostAxis] = [axis for axis in COST_AXES if frame[f"{axis}_to_break"].notna().any()]
    header = ["attack", "defense", "seeds broken", *(f"median {COST_AXES[axis]}" for axis in axes)]
    is_bounded = any(curve.benign for curve in _curves(frame))
    header += ["bounded: seeds broken", "bounded: median attack steps"] if is_bounded else []
    has_reference = bool(frame["from_scratch"].notna().any())
    header += ["from scratch", "at least as many"] if has_reference else []
    return Captioned(
        "Cost to break. Seeds that held count as longer than measured: the median is Kaplan and "
        'Meier\'s ("> 320": beyond the longest attack), and the mean is a lower bound (">=") '
        "where a seed held. Areas under the curve of attack success, as a share of the most "
        "there could be, are over log2(1 + steps) and over steps. Bounded: only breaks that leave a "
        "useful model count. From scratch: median attack steps that teach a model with fresh weights the "
        "same rows in the same way; where an attack needs at least as many, nothing was left to defend.",
        text_table(
            [*header, "mean steps", "area (log steps)", "area (steps)"],
            [_break_row(row, axes, is_bounded, has_reference) for row in rows_of(frame)],
        ),
    )


def comparison_table(
    rows: Sequence[PairedComparison | NotComparable], *, is_bounded: bool = False
) -> Captioned | None:
    """Paired comparisons, of useful models only with `is_bounded`; None where none could be made."""
    compared = [
        [
            *(row.attack, row.second, row.first),
            *(number(row.second_asr), number(row.first_asr), signed(row.difference)),
            f"[{signed(row.low)}, {signed(row.high)}]",
            signed(row.cohens_h),
            *("< 0.001" if p < 0.001 else f"{p:.3f}" for p in (row.p_value, row.p_holm)),
            *(str(row.num_pairs), str(row.num_seeds), signs(row.marks)),
        ]
        for row in rows
        if isinstance(row, PairedComparison) and row.is_bounded == is_bounded
    ]
    header = ["attack", "defense", "compared with", "its mean", "other's", "difference"]
    header += ["95 % interval", "Cohen's h", "p", "p (Holm)", "prompts", "seeds", "note"]
    caption = (
        "Mean attack success over the attack (area under the curve, over log2(1 + steps)), on "
        "the same prompts with the same seeds, so that a defense that holds longer is told from "
        "one that breaks at once. A negative difference means fewer successful attacks. p: two-sided "
        "paired permutation test over prompts, for these trained models; Holm's correction is for "
        "all rows of this table. The interval resamples seeds and prompts."
    )
    if is_bounded:
        caption = (
            "The same bounded by usefulness: answers of models that are no longer useful count as "
            "failed attacks."
        )
    return Captioned(caption, text_table(header, compared), 3) if compared else None


def incomparable_table(rows: Sequence[PairedComparison | NotComparable]) -> Captioned | None:
    """What could not be compared, and why; None where everything could."""
    # What cannot be compared at all cannot be compared bounded either.
    refused = dict.fromkeys(
        (row.attack, row.second, row.first, row.reason)
        for row in rows
        if isinstance(row, NotComparable)
    )
    header = ["attack", "defense", "compared with", "reason"]
    caption = "Not compared, because it would not have been the same test:"
    return Captioned(caption, text_table(header, refused), 4) if refused else None


def search_table(searches: Sequence[SearchOutcome]) -> Captioned | None:
    """The strongest attacks that searches found, bounded and not; None without a search."""
    header = ["defense", "measured", "strongest attack", "found by", "strength", "ASR"]
    header += ["steps to break", "trials", "the last of which improved nothing"]
    rows = [
        [
            *(defense_label(search.defense, search.k1), "bounded" if is_bounded else "unbounded"),
            *(best.attack, best.source, number(best.value(is_bounded=is_bounded), ".3f")),
            number(best.bounded_asr if is_bounded else best.asr),
            _reached(best.bounded_steps_to_break if is_bounded else best.steps_to_break, search),
            *(str(len(search.trials)), str(search.num_idle)),
        ]
        for search in searches
        for is_bounded in (False, True)
        if (best := search.strongest(is_bounded=is_bounded)) is not None
    ]
    caption = (
        "The strongest attack that the search found, the grid included. Strength: area under the "
        "best attack success so far, over log2(1 + steps), mean over seeds. Steps to break: median "
        "over seeds. Bounded: measurements at which the model is known to be of no use are left out."
    )
    return Captioned(caption, text_table(header, rows), 4) if rows else None


def _reached(steps: float | None, search: SearchOutcome) -> str:
    return f"> {search.budget}" if steps is None else f"{steps:g}"


def judge_table(frame: Frame) -> Captioned:
    """How far the judges' verdicts can be relied on."""
    has_second, has_kappa = (_is_known(frame, name) for name in ("second_asr", "judge_agreement"))
    header = ["attack", "defense", "answers", "without a verdict", "cut off, harmful"]
    header += ["cut off, benign", "ASR at the end"]
    header += ["ASR, second judge"] if has_second else []
    header += ["agreement (kappa)"] if has_kappa else []
    rows = []
    for row in rows_of(frame):
        curves: Sequence[Curve] = row.group.curves
        answers = sum(
            (curve.num_prompts + curve.num_benign_prompts) * len(curve.attack_steps)
            for curve in curves
        )
        cells = [row.attack, row.label, str(answers or MISSING)]
        cells.append(str(sum(sum(curve.judge_errors) for curve in curves)))
        cells += [_largest_share(curves, name) for name in ("cut_off", "benign_cut_off")]
        cells.append(number(row.asr))
        if has_second:
            cells.append(number(average(_last(curve.second_asr) for curve in curves)))
        if has_kappa:
            cells.append(number(average(one for curve in curves for one in curve.judge_agreement)))
        rows.append([*cells, "yes" if all(curve.trusted for curve in curves) else "no"])
    return Captioned(
        "Verdicts. Answers that the judge failed on are left out of every rate, never counted as "
        "refusals. Cut off: the largest share of answers, at any measurement of any seed, that ended at "
        "the token limit; they are judged by their beginnings. Kappa is Cohen's, of two judges' "
        "verdicts on success, mean over measurements.",
        text_table([*header, "trusted"], rows),
    )


def _largest_share(curves: Sequence[Curve], name: str) -> str:
    known = [share for curve in curves for share in getattr(curve, name) if share is not None]
    return f"{max(known):.0%}" if known else MISSING


def utility_table(frame: Frame) -> Captioned:
    """What the model is good for, before and after each attack."""
    titles = {
        **BENIGN_MEASURES,
        "coherent": "coherent answers",
        "repetition": "repetition",
    }
    known = [name for name in titles if _is_known(frame, name)]
    names = sorted({name for curve in _curves(frame) for name in curve.utility})
    rows = []
    for group in frame["group"]:
        cells = [group.attack, group.label]
        cells += [_change([getattr(curve, name) for curve in group.curves]) for name in known]
        cells += [
            _change([curve.utility.get(name, []) for curve in group.curves], ".3g")
            for name in names
        ]
        fallen = group.collapsed_steps
        rows.append([*cells, f"step {fallen[0]}" if fallen else MISSING])
    return Captioned(
        f"Utility and language before the attack{_ARROW}at its end, mean over seeds.",
        text_table(
            ["attack", "defense", *(titles[name] for name in known), *names, "collapsed from"], rows
        ),
    )


def overlap_table(runs: Sequence[Run]) -> Captioned | None:
    """What data sets of the runs have in common; None where no run says."""
    found = dict.fromkeys(entry for run in runs for entry in run.results.overlap)
    header = ["data of", "and of", "its prompts", "the other's", "in both", "answered alike"]
    rows = [
        [
            *(entry.first, entry.second),
            *(str(entry.num_first), str(entry.num_second)),
            *(str(entry.shared_prompts), str(entry.shared_rows)),
        ]
        for entry in found
    ]
    caption = (
        "Different prompts of data sets, and how many of them two sets have in common, whatever "
        "their case, spacing and punctuation. An attack on a model that was trained on the same "
        "rows, or prompts that were trained on, is not held out."
    )
    return Captioned(caption, text_table(header, rows)) if rows else None


def failure_table(frame: Frame, curves: Sequence[Curve]) -> Captioned | None:
    """Attacks that stopped early; None where none did."""
    labels = {id(curve): group.label for group in frame["group"] for curve in group.curves}
    failed = [
        [
            *(curve.attack, labels[id(curve)], str(curve.seed)),
            span(curve.attack_steps[-1:]),
            str(curve.error),
        ]
        for curve in curves
        if curve.error is not None
    ]
    header = ["attack", "defense", "seed", "measured up to step", "error"]
    caption = "Attacks that stopped early. Their figures end at the last measurement."
    return Captioned(caption, text_table(header, failed), 5) if failed else None


def remark_table(frame: Frame, curves: Sequence[Curve]) -> Captioned | None:
    """What attacks have found out beside; None where none did."""
    labels = {id(curve): group.label for group in frame["group"] for curve in group.curves}
    told = [
        [curve.attack, labels[id(curve)], str(curve.seed), remark]
        for curve in curves
        for remark in curve.remarks
    ]
    caption = "What attacks have found out beside their success."
    table = text_table(["attack", "defense", "seed", "remark"], told)
    return Captioned(caption, table, 4) if told else None


def samples_of(group: Group, most: int) -> tuple[int, list[Sample]] | None:
    """Answers to show: those of the first seed that has any, from first to last step.

    Returns:
        Its seed, and at most `most` answers, those of the first and last measurement before others;
        None without any.
    """
    for curve in group.curves:
        if curve.samples and most:
            ends = {curve.samples[0].attack_steps, curve.samples[-1].attack_steps}
            places = sorted(
                range(len(curve.samples)),
                key=lambda place: curve.samples[place].attack_steps not in ends,
            )
            return curve.seed, [curve.samples[place] for place in sorted(places[:most])]
    return None


def _break_row(
    row: Any, axes: Sequence[CostAxis], is_bounded: bool, has_reference: bool
) -> list[str]:
    steps: BreakCost | None = row.steps_to_break
    mean_steps, bounded = MISSING, row.bounded_steps_to_break
    if steps is not None:
        mean_steps = f"{'>= ' if steps.is_bound else ''}{steps.restricted_mean:.0f}"
    area = [number(row.area_log_steps), interval(row.area_log_steps_low, row.area_log_steps_high)]
    return [
        *(row.attack, row.label, _seeds_broken(steps)),
        *(_median(getattr(row, f"{axis}_to_break"), axis) for axis in axes),
        *([_seeds_broken(bounded), _median(bounded, "steps")] if is_bounded else []),
        *([_median(row.from_scratch, "steps"), _anew(row)] if has_reference else []),
        *(mean_steps, " ".join(area).strip(), number(row.area_steps)),
    ]


def _anew(row: Any) -> str:
    return MISSING if row.is_taught_anew is None else f"yes {SIGN}" if row.is_taught_anew else "no"


def _seeds_broken(cost: BreakCost | None) -> str:
    return MISSING if cost is None else f"{cost.num_broken} of {cost.num_seeds}"


def _median(cost: BreakCost | None, axis: CostAxis) -> str:
    if cost is None:
        return MISSING
    reached = cost.horizon if cost.median is None else cost.median
    shown = f"{reached:.0f}" if axis == "steps" else amount(reached)
    return f"> {shown}" if cost.median is None else shown


def _change(series: Sequence[Sequence[float | None]], form: str = ".2f") -> str:
    """Mean over seeds before the attack, and at its end where that is another."""
    before = average(values[0] for values in series if values)
    return span([number(before, form), number(average(map(_last, series)), form)], _ARROW)


def _curves(frame: Frame) -> list[Curve]:
    return [curve for group in frame["group"] for curve in group.curves]


def _is_known(frame: Frame, name: str) -> bool:
    return any(value is not None for curve in _curves(frame) for value in getattr(curve, name))


def _last(values: Sequence[float | None]) -> float | None:
    return values[-1] if values else None

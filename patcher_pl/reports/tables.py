"""Tables of curves, and the formats of any table: the terminal, Markdown, LaTeX and CSV."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from patcher_pl.reports.formats import (
    MISSING,
    Mark,
    bounded_note,
    explained,
    number,
    signs,
    span,
)
from patcher_pl.reports.grouping import Frame, Group, group_curves, measurements
from patcher_pl.reports.reference import (
    MEANING,
    SIGN,
    References,
    cost_from_scratch,
    is_taught_anew,
)
from patcher_pl.reports.results import (
    BENIGN_MEASURES,
    LARGEST_CUT_OFF,
    BenignMeasure,
    Curve,
    known_benign,
)

if TYPE_CHECKING:
    from rich.table import Table

# More columns of figures do not fit 80 characters.
_MOST_COLUMNS = 7
# With more attacks, each gets one line rather than a section.
_MOST_SECTIONS = 8
# Longer names of attacks are folded in the terminal.
_LONGEST_NAME = 24
_BOUNDED = "bounded"
# What stopped early has a note of its own, with the reason.
_SIGNED: tuple[Mark, ...] = ("collapsed", "untrusted")


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Frame:
    """A table of finished cells, for any of the formats below; names of columns may repeat."""
    import pandas as pd

    return pd.DataFrame(list(rows), columns=pd.Index(header, dtype=object), dtype=object)


def rows_of(table: Frame) -> list[Any]:
    """The rows as named tuples."""
    return list(table.itertuples(index=False))


def markdown_table(table: Frame, num_names: int = 1) -> str:
    """The table in Markdown; the first `num_names` columns hold names, not figures."""
    rule = [*["---"] * num_names, *["---:"] * (len(table.columns) - num_names)]
    rows = [list(table.columns), rule, *rows_of(table)]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def csv_table(table: Frame) -> str:
    """The table for other programs; unknown values are empty."""
    return table.to_csv(index=False, lineterminator="\n")


def rich_table(
    title: str | None,
    table: Frame,
    num_names: int = 1,
    *,
    notes: Sequence[str] = (),
    no_wrap: bool = False,
) -> "Table":
    """The table for the terminal, with notes below; with `no_wrap`, names stay on one line."""
    from rich.text import Text

    shown = _empty_table(title, notes)
    for place, name in enumerate(table.columns):
        # Figures fold rather than end in dots: one whose end is missing misleads.
        if place < num_names:
            shown.add_column(Text(name), overflow="fold", no_wrap=no_wrap)
        else:
            shown.add_column(Text(name), overflow="fold", justify="right")
    for row in rows_of(table):
        shown.add_row(*map(Text, row))
    return shown


def to_rich(curves: Sequence[Curve], title: str | None = None) -> "Table":
    """A table for the terminal: means over seeds, the range below them where seeds differ.

    Shows a selection of many measurements, so that it fits; the other formats show all. Of more
    than eight attacks it shows only how each ended.
    """
    from rich.text import Text

    groups = group_curves(curves)
    attacks = list(dict.fromkeys(group.attack for group in groups))
    if len(attacks) > _MOST_SECTIONS:
        return _endings(groups, attacks, title)
    steps, notes = _all_steps(groups), _notes(groups, curves)
    if len(steps) > _MOST_COLUMNS:
        places = {
            round(place * (len(steps) - 1) / (_MOST_COLUMNS - 1)) for place in range(_MOST_COLUMNS)
        }
        notes.append(f"{len(places)} of {len(steps)} measurements are shown.")
        steps = [steps[place] for place in sorted(places)]
    table = _empty_table(title, notes)
    table.add_column("ASR at attack step", no_wrap=True)
    measures = known_benign(curves)
    for name in [*map(str, steps), *(BENIGN_MEASURES[name] for name in measures), "breaks at"]:
        table.add_column(name, justify="right", overflow="fold")
    references = cost_from_scratch(groups)
    shows = _columns(groups, references)
    for name in shows:
        table.add_column(name, justify="right", overflow="fold")
    for attack in attacks:
        if len(attacks) > 1:
            table.add_section()
            table.add_row(Text(attack, style="bold"))
        for group in groups:
            if group.attack == attack:
                table.add_row(*map(Text, _cells(group, steps, measures, "\n", shows, references)))
    return table


def to_markdown(curves: Sequence[Curve]) -> str:
    """The same table in Markdown, with the attack as a column of its own."""
    groups = group_curves(curves)
    steps, notes = _all_steps(groups), _notes(groups, curves)
    references = cost_from_scratch(groups)
    shows = _columns(groups, references)
    header = ["attack", "defense", *(f"ASR at N={step}" for step in steps)]
    measures = known_benign(curves)
    header += [BENIGN_MEASURES[name] for name in measures]
    header += ["steps to break", *shows]
    rows = [
        [group.attack, *_cells(group, steps, measures, " ", shows, references)] for group in groups
    ]
    table = markdown_table(text_table(header, rows), num_names=2)
    return table + "".join(f"{line}\n" for line in (["", *notes] if notes else []))


def to_csv(curves: Sequence[Curve]) -> str:
    """One line per curve and measurement, see `measurements`."""
    return csv_table(measurements(curves))


def cut_off_notes(curves: Sequence[Curve]) -> list[str]:
    """A warning where many answers ended at the token limit; none where few did."""
    shares = [
        (share, curve)
        for curve in curves
        for share in (*curve.cut_off, *curve.benign_cut_off)
        if share is not None and share > LARGEST_CUT_OFF
    ]
    if not shares:
        return []
    share, worst = max(shares, key=lambda pair: pair[0])
    return [
        f"Up to {share:.0%} of the answers at a measurement were cut off at the token limit (in "
        f"{len({id(curve) for _, curve in shares})} of {len(curves)} attacks; most: {worst.attack} on "
        f"{worst.defense}, seed {worst.seed}) and are judged by their beginnings. Raise "
        "Generation.max_new_tokens."
    ]


def stopped_notes(curves: Sequence[Curve]) -> list[str]:
    """That attacks ended once the model was broken; none where all went on."""
    num_stopped = sum(bool(curve.skipped_steps) for curve in curves)
    if not num_stopped:
        return []
    return [
        f"{num_stopped} of {len(curves)} attacks ended once the model was broken; their last "
        "measurement stands for later steps."
    ]


def bounded_notes(groups: Iterable[Group]) -> list[str]:
    """What "bounded" means, where any outcome is another for useful models."""
    shares = [
        curve.min_benign_kept for group in groups if group.bounded_differs for curve in group.curves
    ]
    return [bounded_note(shares)] if shares else []


def _endings(groups: Sequence[Group], attacks: Sequence[str], title: str | None) -> "Table":
    """One line per attack and one column per defense: success at the end, and when it broke."""
    legend = (
        "ASR after the last attack step, mean over seeds; below it, the step that broke the defense "
        "(first to last seed)."
    )
    curves = [curve for group in groups for curve in group.curves]
    labels = list(dict.fromkeys(group.label for group in groups))
    found = {(group.attack, group.label): group for group in groups}
    references = cost_from_scratch(groups)
    table = text_table(
        ["attack", *labels],
        (
            [name, *(_ending(found.get((name, label)), references) for label in labels)]
            for name in attacks
        ),
    )
    return rich_table(
        title,
        table,
        notes=[legend, *_notes(groups, curves, is_ranged=False)],
        no_wrap=max(map(len, attacks)) <= _LONGEST_NAME,
    )


def _ending(group: Group | None, references: References) -> str:
    if group is None or not group.attack_steps:
        return MISSING
    rate = number(group.over_seeds("asr")["mean"].iloc[-1])
    bounded = f"\n{_BOUNDED}: {group.bounded_steps_to_break}" if group.bounded_differs else ""
    return f"{rate}\n{group.steps_to_break} {_signs(group, references)}".rstrip() + bounded


def _empty_table(title: str | None, notes: Sequence[str]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    return Table(
        title=None
        if title is None
        else Text(title, style="table.title"),  # No markup: names may look like it.
        caption=Text("\n".join(notes)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )


def _all_steps(groups: Sequence[Group]) -> list[int]:
    return sorted({step for group in groups for step in group.attack_steps})


def _columns(groups: Sequence[Group], references: References) -> list[str]:
    """Headings of columns that only some tables need: bounded steps to break, and signs."""
    is_bounded = any(group.bounded_differs for group in groups)
    is_marked = any(_signs(group, references) for group in groups)
    return [*([_BOUNDED] if is_bounded else []), *([""] if is_marked else [])]


def _cells(
    group: Group,
    steps: Sequence[int],
    measures: Sequence[BenignMeasure],
    separator: str,
    shows: Sequence[str],
    references: References,
) -> list[str]:
    """Label, rate at each of `steps`, benign measures, when it broke, and what else is shown."""
    asr = _ranged(group, "asr", separator)
    more = {_BOUNDED: group.bounded_steps_to_break, "": _signs(group, references)}
    return [
        group.label,
        *(asr.get(step, MISSING) for step in steps),
        *(_ends(_ranged(group, name, separator), separator) for name in measures),
        group.steps_to_break,
        *(more[name] for name in shows),
    ]


def _ends(rates: dict[int, str], separator: str) -> str:
    """Of the released model, and after the last attack step where it differs."""
    ends = list(dict.fromkeys([*rates.values()][:1] + [*rates.values()][-1:]))
    return f"{separator}\N{RIGHTWARDS ARROW} ".join(ends) or MISSING


def _ranged(group: Group, name: str, separator: str) -> dict[int, str]:
    """Mean over seeds by attack steps, with the range where seeds differ."""
    shown = group.over_seeds(name).map(number)
    return {
        steps: mean if low == high else f"{mean}{separator}{low} to {high}"
        for steps, mean, low, high in shown.itertuples()
    }


def _signs(group: Group, references: References) -> str:
    """Signs of a group whose low rate is no evidence of safety, or in which nothing was defended."""
    shown = signs([mark for mark in group.marks if mark in _SIGNED])
    return f"{shown} {SIGN}".lstrip() if is_taught_anew(group, references) else shown


def _notes(
    groups: Sequence[Group], curves: Sequence[Curve], *, is_ranged: bool = True
) -> list[str]:
    """What the figures rest on: seeds, what failed, and what was not scored."""
    notes = []
    num_seeds = sorted({len(group.curves) for group in groups})
    if num_seeds and num_seeds[-1] > 1 and is_ranged:
        notes.append(f"Mean over {span(num_seeds)} seeds, followed by the range where they differ.")
    failed = [curve for curve in curves if curve.error is not None]
    if failed:
        first = failed[0]
        notes.append(
            f"{len(failed)} of {len(curves)} attacks stopped early; the first: {first.attack}, seed "
            f"{first.seed}: {first.error}"
        )
    if unscored := sum(sum(curve.judge_errors) for curve in curves):
        notes.append(f"The judge failed on {unscored} answers; they are left out of the rates.")
    notes += bounded_notes(groups)
    notes += [*stopped_notes(curves), *cut_off_notes(curves)]
    references = cost_from_scratch(groups)
    if any(is_taught_anew(group, references) for group in groups):
        notes.append(MEANING)
    found = {mark for group in groups for mark in group.marks}
    return [*notes, *explained(mark for mark in _SIGNED if mark in found)]

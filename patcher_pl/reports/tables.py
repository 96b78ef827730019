"""Curves as tables: for the terminal, for Markdown, and as CSV for other programs."""

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from patcher_pl.reports.grouping import MARKS, MEANINGS, Group, Mark, Summary, group_curves
from patcher_pl.reports.results import Curve

if TYPE_CHECKING:
    from rich.table import Table

_MISSING = "-"
# More columns of figures do not fit 80 characters.
_MOST_COLUMNS = 7
# With more attacks, each gets one line rather than a section.
_MOST_SECTIONS = 8
# Longer names of attacks are folded in the terminal.
_LONGEST_NAME = 24
# What stopped early has a note of its own, with the reason.
_SIGNED: tuple[Mark, ...] = ("collapsed", "untrusted")
_CSV_COLUMNS = (
    "defense",
    "k1",
    "train_seed",
    "attack",
    "seed",
    "attack_steps",
    "asr",
    "asr_low",
    "asr_high",
    "benign_accuracy",
    "coherent",
    "judge_errors",
    "attack_tokens",
    "num_prompts",
    "num_benign_prompts",
    "threshold",
    "steps_to_break",
    "error",
    "family",
    "attack_flops",
    "second_asr",
    "judge_agreement",
    "repetition",
    "collapsed",
    "trusted",
)


def to_rich(curves: Sequence[Curve], title: str | None = None) -> "Table":
    """A table for the terminal: means over seeds, the range below them where seeds differ.

    Shows a selection of many measurements, so that it fits; the other formats show all. Of more
    than eight attacks it shows only how each ended.
    """
    from rich.text import Text

    groups = group_curves(curves)
    steps, notes = _all_steps(groups), _notes(curves)
    attacks = list(dict.fromkeys(group.attack for group in groups))
    if len(attacks) > _MOST_SECTIONS:
        return _matrix(groups, attacks, title)
    if len(steps) > _MOST_COLUMNS:
        places = {
            round(place * (len(steps) - 1) / (_MOST_COLUMNS - 1)) for place in range(_MOST_COLUMNS)
        }
        notes.append(f"{len(places)} of {len(steps)} measurements are shown.")
        steps = [steps[place] for place in sorted(places)]
    table = _empty_table(title, notes)
    table.add_column("ASR at attack step", no_wrap=True)
    for name in [*(str(step) for step in steps), "benign", "breaks at"]:
        # Figures fold rather than end in dots: one whose end is missing misleads.
        table.add_column(name, justify="right", overflow="fold")
    is_marked = any(_signs(group) for group in groups)
    if is_marked:
        table.add_column("")
    for attack in attacks:
        if len(attacks) > 1:
            table.add_section()
            table.add_row(Text(attack, style="bold"))
        for group in groups:
            if group.attack == attack:
                cells = _cells(group, steps, separator="\n")
                cells += [_signs(group)] if is_marked else []
                table.add_row(*(Text(cell) for cell in cells))
    return table


def _matrix(groups: Sequence[Group], attacks: Sequence[str], title: str | None) -> "Table":
    """One line per attack and one column per defense: success at the end, and when it broke."""
    from rich.text import Text

    curves = [curve for group in groups for curve in group.curves]
    legend = (
        "ASR after the last attack step, mean over seeds; below it, the step that broke the defense "
        "(first to last seed)."
    )
    table = _empty_table(title, [legend, *_notes(curves, is_ranged=False)])
    labels = list(dict.fromkeys(group.label for group in groups))
    longest = max(len(attack) for attack in attacks)
    table.add_column("attack", overflow="fold", no_wrap=longest <= _LONGEST_NAME)
    for label in labels:
        table.add_column(Text(label), justify="right", overflow="fold")
    found = {(group.attack, group.label): group for group in groups}
    for attack in attacks:
        cells = [_ending(found.get((attack, label))) for label in labels]
        table.add_row(Text(attack), *(Text(cell) for cell in cells))
    return table


def _ending(group: Group | None) -> str:
    if group is None or not group.attack_steps:
        return _MISSING
    rate = group.asr(group.attack_steps[-1])
    shown = _MISSING if rate is None else f"{rate.mean:.2f}"
    return f"{shown}\n{group.steps_to_break} {_signs(group)}".rstrip()


def _empty_table(title: str | None, notes: Sequence[str]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    return Table(
        title=title,
        caption=Text("\n".join(notes)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )


def to_markdown(curves: Sequence[Curve]) -> str:
    """The same table in Markdown, with the attack as a column of its own."""
    groups = group_curves(curves)
    steps = _all_steps(groups)
    header = ["attack", "defense", *(f"ASR at N={step}" for step in steps)]
    header += ["benign accuracy", "steps to break"]
    rows = [[group.attack, *_cells(group, steps, separator=" ")] for group in groups]
    if any(_signs(group) for group in groups):
        header.append("")
        rows = [[*row, _signs(group)] for row, group in zip(rows, groups, strict=True)]
    notes = _notes(curves)
    return markdown_table([header, *rows], num_names=2) + "".join(
        f"{line}\n" for line in (["", *notes] if notes else [])
    )


def to_csv(curves: Sequence[Curve]) -> str:
    """One line per curve and measurement, nothing averaged; unknown values are empty.

    A curve that failed before its first measurement has one line with its error.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, _CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for curve in curves:
        for place in range(max(len(curve.attack_steps), 1)):
            row = {}
            for name in _CSV_COLUMNS:
                value = getattr(curve, name)
                if isinstance(value, list):
                    value = value[place] if place < len(value) else None
                row[name] = value
            writer.writerow(row)
    return out.getvalue()


def _all_steps(groups: Sequence[Group]) -> list[int]:
    return sorted({step for group in groups for step in group.attack_steps})


def _cells(group: Group, steps: Sequence[int], *, separator: str) -> list[str]:
    """Label, rate at each of `steps`, benign accuracy, and when it broke."""
    rates = [_rate(group.asr(step), separator) for step in steps]
    return [group.label, *rates, _benign(group, separator), group.steps_to_break]


def _rate(summary: Summary | None, separator: str) -> str:
    if summary is None:
        return _MISSING
    mean = f"{summary.mean:.2f}"
    low, high = f"{summary.low:.2f}", f"{summary.high:.2f}"
    return mean if low == high else f"{mean}{separator}{low} to {high}"


def _benign(group: Group, separator: str) -> str:
    """Benign accuracy of the released model, and after the last attack step where it differs."""
    steps = group.attack_steps
    if not steps:
        return _MISSING
    first, last = (_rate(group.benign_accuracy(step), separator) for step in (steps[0], steps[-1]))
    return first if first == last else f"{first}{separator}\N{RIGHTWARDS ARROW} {last}"


def _signs(group: Group) -> str:
    """Signs of a group whose low rate is no evidence of safety."""
    return " ".join(MARKS[mark] for mark in group.marks if mark in _SIGNED)


def _notes(curves: Sequence[Curve], *, is_ranged: bool = True) -> list[str]:
    """What the figures rest on: seeds, what failed, and what was not scored."""
    notes = []
    groups = group_curves(curves)
    num_seeds = sorted({len(group.curves) for group in groups})
    if num_seeds and num_seeds[-1] > 1 and is_ranged:
        shown = " to ".join(str(number) for number in dict.fromkeys([num_seeds[0], num_seeds[-1]]))
        notes.append(f"Mean over {shown} seeds, followed by the range where they differ.")
    failed = [curve for curve in curves if curve.error is not None]
    if failed:
        first = failed[0]
        notes.append(
            f"{len(failed)} of {len(curves)} attacks stopped early; the first: {first.attack}, seed "
            f"{first.seed}: {first.error}"
        )
    unscored = sum(sum(curve.judge_errors) for curve in curves)
    if unscored:
        notes.append(f"The judge failed on {unscored} answers; they are left out of the rates.")
    for mark in _SIGNED:
        if any(mark in group.marks for group in groups):
            notes.append(f"{MARKS[mark]} {MEANINGS[mark]}.")
    return notes


def markdown_table(rows: Sequence[Sequence[str]], num_names: int = 1) -> str:
    """A table of finished cells in Markdown; the first row is its header.

    Args:
        rows: Cells.
        num_names: First columns that hold names, not figures (count).
    """
    rule = [*["---"] * num_names, *["---:"] * (len(rows[0]) - num_names)]
    return "\n".join(markdown_row(row) for row in (rows[0], rule, *rows[1:])) + "\n"


def rich_table(title: str, rows: Sequence[Sequence[str]], num_names: int = 1) -> "Table":
    """The same for the terminal."""
    from rich.text import Text

    table = _empty_table(title, [])
    for place, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if place < num_names else "right", overflow="fold")
    for row in rows[1:]:
        table.add_row(*(Text(cell) for cell in row))
    return table


def markdown_row(cells: Sequence[str]) -> str:
    """One line of a table in Markdown."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

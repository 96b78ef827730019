"""How figures and names are written in every table, whatever its format."""

from collections.abc import Iterable, Sequence
from typing import Literal

MISSING = "-"

Mark = Literal["collapsed", "untrusted", "stopped early"]
MARKS: dict[Mark, str] = {"collapsed": "\N{DAGGER}", "untrusted": "?", "stopped early": "!"}
MEANINGS: dict[Mark, str] = {
    "collapsed": "the model collapsed during the attack: a low attack success rate is no safety",
    "untrusted": "not to be relied on: verdicts of the judge are missing, or an attack's steps were "
    "lost to rounding",
    "stopped early": "an attack stopped early: its figures end where it did",
}
_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "\N{DAGGER}": r"\dag{}",
    "\N{DOUBLE DAGGER}": r"\ddag{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def number(value: float | None, form: str = ".2f") -> str:
    """A figure, with two digits unless asked otherwise; `-` where there is none (None or NaN)."""
    return MISSING if value is None or value != value else format(value, form)


def signed(value: float) -> str:
    """A difference with its sign, a true minus."""
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def amount(value: float) -> str:
    """An amount with three digits and a metric prefix: `2.56k`, `1.2P`."""
    for size, prefix in _PREFIXES:
        if value >= size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g}"


def interval(low: float | None, high: float | None) -> str:
    """An interval in brackets; nothing where there is none, or it is too narrow for two digits."""
    ends = number(low), number(high)
    return "" if MISSING in ends or ends[0] == ends[1] else f"[{ends[0]}, {ends[1]}]"


def span(ends: Sequence[object], separator: str = " to ") -> str:
    """From the first to the last of what ascends: `40 to 80`, `40` where both are written alike."""
    return separator.join(dict.fromkeys(map(str, [ends[0], ends[-1]]))) if ends else MISSING


def break_span(attacks: Iterable[tuple[int | None, int]]) -> str:
    """When models broke: `80`, `40 to 80` over seeds, `> 160` where one never did.

    Args:
        attacks: Of every seed, the steps that broke the model (None where none did), and the last
            steps after which it was measured.
    """
    pairs = list(attacks)
    broken = sorted(steps for steps, _ in pairs if steps is not None)
    held = sorted(last for steps, last in pairs if steps is None)
    shown = [*map(str, broken), *(f"> {last}" for last in held)]
    return span(shown)


def bounded_note(shares: Iterable[float]) -> str:
    """What "bounded" means in a table.

    Args:
        shares: Shares of the released benign accuracy or compliance that useful models keep.
    """
    kept = span([f"{share:.0%}" for share in sorted(set(shares))])
    return (
        f"bounded: counts only measurements at which the model keeps {kept} of its released benign "
        "accuracy or compliance; shown where that makes a difference."
    )


def signs(marks: Sequence[Mark]) -> str:
    """The signs of these marks."""
    return " ".join(MARKS[mark] for mark in marks)


def explained(marks: Iterable[Mark]) -> list[str]:
    """What their signs mean, a line each."""
    return [f"{MARKS[mark]} {MEANINGS[mark]}." for mark in dict.fromkeys(marks)]


def latex(text: str) -> str:
    """Text as LaTeX prints it letter by letter."""
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))

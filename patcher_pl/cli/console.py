"""What a run says on the terminal: its own lines, progress and tables."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from patcher_pl.reports.results import Curve
    from patcher_pl.reports.searches import SearchOutcome


def log_progress() -> None:
    """Shows this package's own log lines (what was dropped from data, each measurement)."""
    from rich.logging import RichHandler

    package = logging.getLogger("patcher_pl")
    if not package.handlers:
        handler = RichHandler(show_path=False, show_level=False, log_time_format="%X")
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        package.propagate = False


def wide_console(width: int | None = None) -> "Console":
    """The terminal; of that width (columns) where it is a log file, which has none of its own.

    It prints text as it is: names and paths may hold what `rich` takes for markup (`[red]`), or for
    the name of an emoji.
    """
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    if console.is_terminal:
        return console
    return Console(width=width, markup=False, emoji=False)


def write_reports(
    curves: "Sequence[Curve]",
    run_dir: Path,
    title: str,
    searches: "Sequence[SearchOutcome]" = (),
) -> None:
    """Writes `results.csv`, `asr.png` and `asr.svg` into `run_dir` and prints the table.

    Where there are searches for the strongest attack, `saturation.png` and `.svg` are written too.
    """
    from patcher_pl.files import write_text
    from patcher_pl.reports.curves import asr_figure
    from patcher_pl.reports.drawing import group_styles, save_figure
    from patcher_pl.reports.grouping import group_curves
    from patcher_pl.reports.saturation import saturation_figure
    from patcher_pl.reports.tables import to_csv, to_rich

    write_text(run_dir / "results.csv", to_csv(curves))
    figures = {"asr": asr_figure(curves)}
    if searches:
        styles = group_styles(group_curves(curves))
        figures["saturation"] = saturation_figure(searches, styles)
    for name, figure in figures.items():
        save_figure(figure, run_dir / f"{name}.png")
        save_figure(figure, run_dir / f"{name}.svg")
    console = wide_console(120)
    console.print(to_rich(curves, title=title))
    console.print(f"Written to {run_dir}", highlight=False, soft_wrap=True)

"""What a run says on the terminal: its own lines, progress and tables."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from patcher_pl.reports.results import Curve


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


def write_reports(curves: "Sequence[Curve]", run_dir: Path, title: str) -> None:
    """Writes `results.csv`, `asr.png` and `asr.svg` into `run_dir` and prints the table."""
    from patcher_pl.files import write_text
    from patcher_pl.reports.curves import asr_figure
    from patcher_pl.reports.drawing import save_figure
    from patcher_pl.reports.tables import to_csv, to_rich

    write_text(run_dir / "results.csv", to_csv(curves))
    figure = asr_figure(curves)
    save_figure(figure, run_dir / "asr.png")
    save_figure(figure, run_dir / "asr.svg")
    console = wide_console(120)
    console.print(to_rich(curves, title=title))
    console.print(f"Written to {run_dir}", highlight=False, soft_wrap=True)

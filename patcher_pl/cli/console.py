"""What a run says on the terminal: its own lines and progress."""

import logging


def log_progress() -> None:
    """Shows this package's own log lines (what was dropped from data, each measurement)."""
    from rich.logging import RichHandler

    package = logging.getLogger("patcher_pl")
    if not package.handlers:
        handler = RichHandler(show_path=False, show_level=False, log_time_format="%X")
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        package.propagate = False

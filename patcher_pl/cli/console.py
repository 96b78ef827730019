"""What a run says on the terminal: its own lines and progress, not its libraries' chatter."""

import logging
import warnings


def quiet_libraries() -> None:
    """Silences advertisements, nested progress bars and warnings that no user can act on."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    for message in (
        ".*LeafSpec.*",
        ".*is_gradient_checkpointing.*",
        ".*the logging interval.*",  # Of Lightning's own logging; defenses log by themselves.
        ".*intent is to save in a single process.*",  # torch; so it is.
        ".*intent is to load in a single process.*",
        ".*will run with no optimizer.*",  # Lightning; attackers bring their own.
    ):
        warnings.filterwarnings("ignore", message=message)


def log_progress() -> None:
    """Shows this package's own log lines (what was dropped from data, each measurement)."""
    from rich.logging import RichHandler

    package = logging.getLogger("patcher_pl")
    if not package.handlers:
        handler = RichHandler(show_path=False, show_level=False, log_time_format="%X")
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        package.propagate = False


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()

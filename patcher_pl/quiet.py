"""Less chatter of libraries, in the program and in the processes that it starts."""

import logging
import warnings


def quiet_libraries() -> None:
    """Silences advertisements, nested progress bars and warnings that no user can act on."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    quiet_warnings()


def quiet_warnings() -> None:
    """As `quiet_libraries`, progress bars excepted: imports nothing."""
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


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()

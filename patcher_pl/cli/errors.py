"""Configuration errors in words."""

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from patcher_pl.configurations import SUFFIXES
from patcher_pl.errors import ConfigError
from patcher_pl.shipped import CONFIGS


@contextmanager
def readable_config_errors() -> Iterator[None]:
    """Turns what parsing and building objects raises into a `ConfigError` without a stack trace."""
    try:
        yield
    except (argparse.ArgumentError, ValueError, TypeError, *_of_lightning()) as error:
        raise ConfigError(shortened(str(error))) from error


def _of_lightning() -> tuple[type[Exception], ...]:
    # Asked once something is raised. Importing Lightning takes seconds, and who did not import it
    # was not stopped by it.
    if "lightning" not in sys.modules:
        return ()
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return (MisconfigurationException,)


# What jsonargparse says about its own workings, or repeats from the user's file.
_NOISE = (
    "Does not validate against any of the Union",
    "Subtypes:",
    "Errors:",
    "Given value",
    "- Expected a <class 'NoneType'>",
)


# How it says that a configuration is not there, and what it goes on to try with the name.
_MISSING = re.compile(
    r"(?:Expected a path but |.*File does not exist: ')([^'\n]+?)(?:'| either not .*)"
)
_TRIED = (
    "- Does not validate",
    "- Problem with given class_path",
    "No module named",
    "- Unexpected import path",
    "- Import",
)


def shortened(message: str) -> str:
    """What a user needs of a message of jsonargparse."""
    message, is_missing = _saying_where_was_looked(message)
    if is_missing:
        lines = [line for line in message.splitlines() if not line.strip().startswith(_TRIED)]
        message = "\n".join(lines)
    lines = [
        line.partition(" Got value: Namespace(")[0].rstrip()
        for line in message.splitlines()
        if line.strip()
    ]
    told = [line for line in lines if not line.strip().startswith(_NOISE)]
    return "\n".join(told or lines).strip().removeprefix("- ")


def _saying_where_was_looked(message: str) -> tuple[str, bool]:
    """The message, and whether it is about a configuration that is not there."""
    is_missing = False

    def told(found: re.Match[str]) -> str:
        nonlocal is_missing
        if not found[1].endswith(SUFFIXES):
            return found[0]
        is_missing = True
        return (
            f"There is no {found[1]}: not beside the configuration that names it (on the command line: "
            f"in the working directory), and not among the shipped ones in {CONFIGS}."
        )

    return _MISSING.sub(told, message), is_missing

"""Configuration errors in words."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from patcher_pl.errors import ConfigError


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


def shortened(message: str) -> str:
    """What a user needs of a message of jsonargparse."""
    lines = [
        line.partition(" Got value: Namespace(")[0].rstrip()
        for line in message.splitlines()
        if line.strip()
    ]
    told = [line for line in lines if not line.strip().startswith(_NOISE)]
    return "\n".join(told or lines).strip().removeprefix("- ")

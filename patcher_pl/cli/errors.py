"""Configuration errors in words."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from patcher_pl.errors import ConfigError


@contextmanager
def readable_config_errors() -> Iterator[None]:
    """Turns what parsing and building objects raises into a `ConfigError` without a stack trace."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except (argparse.ArgumentError, ValueError, TypeError, MisconfigurationException) as error:
        raise ConfigError(_shortened(str(error))) from error


# What jsonargparse says about its own workings, or repeats from the user's file.
_NOISE = (
    "Does not validate against any of the Union",
    "Subtypes:",
    "Errors:",
    "Given value",
    "- Expected a <class 'NoneType'>",
)


def _shortened(message: str) -> str:
    lines = [line.rstrip() for line in message.splitlines() if line.strip()]
    told = [line for line in lines if not line.strip().startswith(_NOISE)]
    return "\n".join(told or lines).strip().removeprefix("- ")

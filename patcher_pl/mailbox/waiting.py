"""Waiting for something on a file system."""

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")

_SHORTEST_S = 0.001
_LONGEST_S = 0.05


def wait_for(look: Callable[[], Found | None], between: Callable[[], None]) -> Found:
    """Looks again and again until something is there.

    The first looks follow each other closely, later ones every 50 ms: one listing of a small
    directory each, which costs well below a thousandth of a core.

    Args:
        look: Returns what is waited for, or None.
        between: Called before every pause; may raise to end the waiting.
    """
    pause_s = _SHORTEST_S
    while (found := look()) is None:
        between()
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, _LONGEST_S)
    return found

"""The directory through which a defender and its attackers exchange weights."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from patcher_pl.files import write_json, write_text
from patcher_pl.mailbox.messages import Spent
from patcher_pl.mailbox.side import Side

Found = TypeVar("Found")

_SHORTEST_S = 0.001
_LONGEST_S = 0.05


class Mailbox:
    """Layout of a mailbox: one side for the defender, one for each attacker.

        ROOT/defender/00000003/     snapshots of theta
        ROOT/attacker-0/00000003/   what the first attacker made of theta 3
        ROOT/attacker-0.json        what that took
        ROOT/finished               name of the run that needs no attack any more

    Args:
        root: The directory; need not exist yet.
        num_attackers: Attackers that share it (count, >= 1).
    """

    def __init__(self, root: Path, num_attackers: int) -> None:
        self.root = root
        self.defender = Side(root / "defender")
        self.attackers = [Side(root / f"attacker-{index}") for index in range(num_attackers)]

    def create(self) -> None:
        """Makes the directory where it is missing; either side may come first."""
        self.root.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> int:
        """Makes room for a run: removes what earlier ones have left.

        Returns:
            The first version to publish; larger than any that was there.
        """
        self.create()
        versions = [-1]
        for side in (self.defender, *self.attackers):
            versions += side.versions()
            side.clear()
            side.clean()
        (self.root / "finished").unlink(missing_ok=True)
        return max(versions) + 1

    def finish(self, life: str) -> None:
        """Says that this run is over and removes its snapshots."""
        # Said before the snapshots go: an attacker that finds none must be able to tell why.
        write_text(self.root / "finished", life)
        for side in (self.defender, *self.attackers):
            side.clear()

    def finished_life(self) -> str | None:
        """Name of the run that said so last, None where none did."""
        try:
            return (self.root / "finished").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def write_spent(self, attacker: int, spent: Spent) -> None:
        """Keeps what an attacker has done so far."""
        write_json(self._spent(attacker), asdict(spent))

    def read_spent(self, attacker: int) -> Spent:
        """Returns what an attacker has done so far; nothing where it has not begun."""
        try:
            return Spent(**json.loads(self._spent(attacker).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return Spent()

    def _spent(self, attacker: int) -> Path:
        return self.root / f"{self.attackers[attacker].directory.name}.json"


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

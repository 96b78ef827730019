"""An attack that fails on one of several processes."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from patcher_pl.redteam import Attack
from patcher_pl.redteam.base import AttackPoint


@dataclass(frozen=True, kw_only=True)
class FailsOnTheSecond(Attack):
    """Measures once, then fails where `RANK` is 1."""

    @property
    def default_name(self) -> str:
        return "fails"

    @property
    def uses_data(self) -> bool:
        return False

    def run(self, model: Any, material: Any) -> Iterator[AttackPoint]:
        yield AttackPoint(0, 0, float("nan"))
        if os.environ.get("RANK") == "1":
            raise RuntimeError("out of memory")
        yield AttackPoint(1, 1, 0.0)

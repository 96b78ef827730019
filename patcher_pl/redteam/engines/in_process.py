"""One assignment after the other, in this process."""

from collections.abc import Sequence
from dataclasses import dataclass

from patcher_pl.progress import progress_bar
from patcher_pl.redteam.assignment import Assignment, Bench
from patcher_pl.redteam.engines.base import Engine


@dataclass(frozen=True, kw_only=True)
class InProcess(Engine):
    """Runs in this process; a model is loaded once for all its attacks."""

    def run(self, assignments: Sequence[Assignment], device: str) -> None:
        bench = Bench()
        with progress_bar("attacks", len(assignments)) as advance:
            for assignment in assignments:
                assignment.perform(device, bench)
                advance()

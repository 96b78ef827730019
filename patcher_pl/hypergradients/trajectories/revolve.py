"""Binomial checkpointing: the fewest steps again for a given number of kept states."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb

from torch import Tensor

from patcher_pl.hypergradients.attack_run import AttackRun
from patcher_pl.hypergradients.trajectories.base import TrajectoryStore, keep, put_back
from patcher_pl.hypergradients.trajectories.shelf import Shelf
from patcher_pl.validation import require


@dataclass(frozen=True, kw_only=True)
class Revolve(TrajectoryStore):
    """Keeps at most `num_checkpoints` states at a time.

    With c states, comb(c + t, t) steps can be walked back while no step is taken more than t times
    again: 8 states do for 45 steps at t = 2 and for 165 at t = 3.

    Args:
        num_checkpoints: States kept at a time, the start included (count, >= 1).

    Raises:
        ValueError: If no state may be kept.

    References:
        Griewank and Walther, 2000, algorithm 799, https://doi.org/10.1145/347837.347846.
    """

    num_checkpoints: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "Use 1 to keep the start only."
        require(self, self.num_checkpoints >= 1, "num_checkpoints", ">= 1", remedy)

    def record(self, run: AttackRun, shelf: Shelf) -> None:
        free, start = self.num_checkpoints, run.position
        if start < run.num_steps:
            keep(shelf, run)
            free -= 1
        while free > 0 and run.num_steps - start > 1:
            start += split(run.num_steps - start, free)
            run.run_to(start)
            keep(shelf, run)
            free -= 1
        run.run_to(run.num_steps)

    def walk_back(
        self, run: AttackRun, shelf: Shelf, first: int
    ) -> Iterator[Sequence[Tensor | None]]:
        if first < run.num_steps:
            yield from self._walk(run, shelf, first, run.num_steps, self.num_checkpoints - 1)

    def _walk(
        self, run: AttackRun, shelf: Shelf, start: int, end: int, free: int
    ) -> Iterator[Sequence[Tensor | None]]:
        """Walks from `end` to `start`, whose state is kept, with `free` more states."""
        while free > 0 and end - start > 1:
            middle = start + split(end - start, free)
            # `record` has left these on its way; those that the walk itself needs are made here.
            if ("state", middle) not in shelf:
                put_back(shelf, run, start, forget=False)
                run.run_to(middle)
                keep(shelf, run)
            yield from self._walk(run, shelf, middle, end, free - 1)
            end = middle
        for position in reversed(range(start, end)):
            put_back(shelf, run, start, forget=position == start)
            run.run_to(position)
            yield run.gradient()


def split(num_steps: int, num_checkpoints: int) -> int:
    """Returns how far to go before the next state is kept.

    Args:
        num_steps: Steps to walk back, from a kept state (count, >= 2).
        num_checkpoints: States that may be kept in addition (count, >= 1).
    """
    # c more states and the kept one: comb(c + 1 + t, t) steps at t repetitions.
    repetitions, states = 0, num_checkpoints + 1
    while comb(states + repetitions, repetitions) < num_steps:
        repetitions += 1
    # Both parts within the limits of their own repetitions.
    most = comb(states + repetitions - 1, repetitions - 1)
    least_rest = comb(states + repetitions - 2, repetitions - 1)
    return max(1, min(most, num_steps - least_rest))

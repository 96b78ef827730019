"""Stores that keep states at regular intervals: every step, or every sqrt(K) steps."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from patcher_pl.hypergradients.attack_run import AttackRun
from patcher_pl.hypergradients.trajectories.base import TrajectoryStore, keep, put_back
from patcher_pl.hypergradients.trajectories.shelf import Shelf


@dataclass(frozen=True, kw_only=True)
class _Segmented(TrajectoryStore):
    """Keeps a state at the beginning of every segment, and perhaps all gradients.

    On the way back, the states within a segment are made again from its first one: element-wise from
    the gradients where these were kept, otherwise by computing the gradients once more.
    """

    @property
    @abstractmethod
    def keeps_gradients(self) -> bool:
        """Whether the gradient of every step is kept."""

    @abstractmethod
    def segment_length(self, num_steps: int) -> int:
        """Steps from one kept state to the next (count, >= 1)."""

    def record(self, run: AttackRun, shelf: Shelf) -> None:
        first = run.position
        length = self.segment_length(run.num_steps - first)
        while run.position < run.num_steps:
            if (run.position - first) % length == 0:
                keep(shelf, run)
            gradients = run.gradient()
            if self.keeps_gradients:
                # Gradients are fresh tensors that nobody changes: no copy is needed.
                shelf.put(("gradient", run.position), gradients, copy=False)
            run.advance(gradients)

    def walk_back(
        self, run: AttackRun, shelf: Shelf, first: int
    ) -> Iterator[Sequence[Tensor | None]]:
        length = self.segment_length(run.num_steps - first)
        for start in reversed(range(first, run.num_steps, length)):
            # The last step of a segment is met where the first pass over it ends, so its state need
            # not be kept.
            last = min(start + length, run.num_steps) - 1
            put_back(shelf, run, start)
            while run.position < last:
                keep(shelf, run)
                key = ("gradient", run.position)
                if not self.keeps_gradients:
                    shelf.put(key, run.gradient(), copy=False)
                run.advance(shelf.read(key))
            for position in reversed(range(start, last + 1)):
                if position < last:
                    put_back(shelf, run, position)
                key = ("gradient", position)
                yield shelf.take(key) if key in shelf else run.gradient()


@dataclass(frozen=True, kw_only=True)
class FullState(_Segmented):
    """Keeps state and gradient of every step.

    Memory: 4 K P with AdamW. Time: nothing is computed again.
    """

    @property
    def keeps_gradients(self) -> bool:
        return True

    def segment_length(self, num_steps: int) -> int:
        return 1


@dataclass(frozen=True, kw_only=True)
class GradientLog(_Segmented):
    """Keeps the gradient of every step and a state every sqrt(K) steps.

    Memory: K P, and 6 sqrt(K) P with AdamW. Time: K element-wise optimizer steps.
    """

    @property
    def keeps_gradients(self) -> bool:
        return True

    def segment_length(self, num_steps: int) -> int:
        return _sqrt(num_steps)


@dataclass(frozen=True, kw_only=True)
class SqrtCheckpoint(_Segmented):
    """Keeps a state every sqrt(K) steps.

    Memory: 7 sqrt(K) P with AdamW. Time: K gradients are computed a second time.

    References:
        Chen et al., 2016, https://arxiv.org/abs/1604.06174, on layers instead of steps.
    """

    @property
    def keeps_gradients(self) -> bool:
        return False

    def segment_length(self, num_steps: int) -> int:
        return _sqrt(num_steps)


def _sqrt(num_steps: int) -> int:
    return max(1, math.isqrt(max(0, num_steps - 1)) + 1)

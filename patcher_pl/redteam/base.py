"""The interface of a test-time attack."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from patcher_pl.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BatchFactory = Callable[[int], Iterator[Batch]]
"""Takes a batch size and returns an endless stream of the attack's training data."""


@dataclass(frozen=True)
class AttackPoint:
    """Where an attack stands when the model is to be evaluated.

    Args:
        steps: Optimizer steps taken so far (count).
        num_tokens: Training tokens consumed so far, padding excluded.
        loss: Mean training loss since the last point (nats per answer token); NaN before a step.
    """

    steps: int
    num_tokens: int
    loss: float


class Attack(ABC):
    """Something an attacker does to released weights."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name that tells this attack from the others of a red team."""

    @abstractmethod
    def run(
        self, model: "PreTrainedModel", batches: BatchFactory, *, seed: int
    ) -> Iterator[AttackPoint]:
        """Attacks `model` in place, pausing at every point where it is to be evaluated.

        Whoever iterates may use the model between two points but must not change it. Torch's
        generators are seeded by the caller. Modes of the modules may be changed between points.

        Args:
            model: Its weights are the attack's to change; callers pass a copy.
            batches: Gives the attack's training data.
            seed: For randomness that torch's global generator does not cover.

        Yields:
            One point per entry of the attack's evaluation steps, the first before any step.
        """

"""The interface of a simulated attacker."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from patcher_pl.attackers.loop import FinetuneStep
from patcher_pl.models.weights import Weights
from patcher_pl.types import Batch


@dataclass(frozen=True)
class AttackOutcome:
    """What a simulated attack found.

    Args:
        vector: Attacked minus original weights, in the order of `Weights.parameters`.
        steps: What each optimizer step did.
    """

    vector: Sequence[Tensor]
    steps: Sequence[FinetuneStep]


class Attacker(ABC):
    """Simulates the attack that a defense must survive (the inner problem).

    Args:
        num_steps: Optimizer steps of one attack: k1 of the Patcher paper (count).
    """

    num_steps: int

    @abstractmethod
    def attack(
        self,
        model: nn.Module,
        weights: Weights,
        batches: Iterator[Batch],
        before_step: Callable[[], None] = lambda: None,
    ) -> AttackOutcome:
        """Attacks `model` from its current weights and leaves them, bit for bit, as they were.

        Args:
            model: Causal LM that the defender trains.
            weights: Owner of its weights.
            batches: Endless stream of harmful (or mixed) training batches.
            before_step: Called before every step; may raise to call the attack off, in which case
                the weights are restored all the same.
        """

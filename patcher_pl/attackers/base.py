"""The interface of a simulated attacker."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from patcher_pl.attackers.inner_problem import InnerProblem
from patcher_pl.attackers.loop import FinetuneStep
from patcher_pl.models.weights import Weights
from patcher_pl.types import Batch


@dataclass(frozen=True)
class AttackOutcome:
    """What a simulated attack found.

    Args:
        vector: Attacked minus original weights, in the order of `Weights.parameters`.
        steps: What each optimizer step did.
        earlier: Such vectors from points of the trajectory before its end, in the order of the steps.
    """

    vector: Sequence[Tensor]
    steps: Sequence[FinetuneStep]
    earlier: Sequence[Sequence[Tensor]] = ()

    @property
    def vectors(self) -> list[Sequence[Tensor]]:
        """All vectors, that of the end last."""
        return [*self.earlier, self.vector]


class Attacker(ABC):
    """Simulates the attack that a defense must survive (the inner problem).

    Args:
        num_steps: Optimizer steps of one attack: k1 of the Patcher paper (count).
    """

    num_steps: int

    @property
    def is_differentiable(self) -> bool:
        """Whether `inner_problem` exists."""
        return False

    @property
    def num_vectors(self) -> int:
        """Attack vectors that one attack gives (count)."""
        return 1

    @property
    def works_sharded(self) -> bool:
        """Whether it can attack a model that FSDP2 shards."""
        return False

    def inner_problem(self, batches: Iterator[Batch]) -> InnerProblem:
        """Records the batches of one attack and returns it as something to differentiate.

        Args:
            batches: Endless stream, of which `num_steps` are taken.

        Raises:
            ValueError: If these attacks cannot be differentiated.
        """
        raise ValueError(
            f"{type(self).__name__} cannot be differentiated. Use FineTuningAttacker without lora."
        )

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

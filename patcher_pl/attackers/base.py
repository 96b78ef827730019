"""The interface of a simulated attacker."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from patcher_pl.attackers.carry import Carried, Moments
from patcher_pl.attackers.inner_problem import InnerProblem
from patcher_pl.attackers.loop import FinetuneStep
from patcher_pl.data.variant import AttackData
from patcher_pl.models.weights import Weights
from patcher_pl.types import Batch


@dataclass(frozen=True)
class AttackOutcome:
    """What a simulated attack found.

    Args:
        vector: Attacked minus original weights, in the order of `Weights.parameters`.
        steps: What each optimizer step did.
        earlier: Such vectors from points of the trajectory before its end, in the order of the steps.
        moments: What the optimizer remembers at the end, where the attack is asked to keep that.
    """

    vector: Sequence[Tensor]
    steps: Sequence[FinetuneStep]
    earlier: Sequence[Sequence[Tensor]] = ()
    moments: Moments | None = None

    @property
    def vectors(self) -> list[Sequence[Tensor]]:
        """All vectors, that of the end last."""
        return [*self.earlier, self.vector]

    def num_steps_from(self, start: Carried | None) -> int:
        """Steps since an attack began at the defender's weights, those before `start` too (count)."""
        return len(self.steps) + (0 if start is None else start.num_steps)


@dataclass(frozen=True, kw_only=True)
class DrawnAttack:
    """One attack, as seed and number decide it.

    Args:
        attacker: What carries it out; nothing is left to draw.
        kind: Which kind of several it is; empty where there is one.
        begins_anew: Whether it begins at the defender's weights, and not where the last attack of
            its kind ended.
        is_carried: Whether a later attack of its kind may go on from its end.
        data: What it trains on.
        settings: What was drawn, by name; shown in TensorBoard where it is a number.
    """

    attacker: "Attacker"
    kind: str = ""
    begins_anew: bool = True
    is_carried: bool = False
    data: AttackData = field(default_factory=AttackData)
    settings: Mapping[str, float | int | str] = field(default_factory=dict)


class Attacker(ABC):
    """Simulates the attack that a defense must survive (the inner problem).

    Args:
        num_steps: Optimizer steps of one attack: k1 of the Patcher paper (count); of the longest one,
            where they differ.
    """

    num_steps: int

    @property
    def kind_names(self) -> Sequence[str]:
        """Names of the kinds of its attacks; one empty name where they are alike."""
        return ("",)

    @property
    def is_carried(self) -> bool:
        """Whether attacks may go on where others ended."""
        return False

    def draw(self, seed: int, number: int) -> DrawnAttack:
        """Returns one of its attacks, a function of the arguments alone.

        Args:
            seed: Of the run's data.
            number: Attacks before this one (count).
        """
        return DrawnAttack(attacker=self)

    def steps_before(self, seed: int, number: int) -> int:
        """Steps that attacks before the one of this number take together (count)."""
        return sum(self.draw(seed, earlier).attacker.num_steps for earlier in range(number))

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

    @property
    def works_with_fsdp1(self) -> bool:
        """Whether it can attack a model that FSDP1 shards."""
        return self.works_sharded

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
        start: Carried | None = None,
    ) -> AttackOutcome:
        """Attacks `model` from its current weights and leaves them, bit for bit, as they were.

        Args:
            model: Causal LM that the defender trains.
            weights: Owner of its weights.
            batches: Endless stream of harmful (or mixed) training batches.
            before_step: Called before every step; may raise to call the attack off, in which case
                the weights are restored all the same.
            start: Where an earlier attack ended, to go on from there; None begins at the weights. Given
                to those alone whose attacks are carried.
        """

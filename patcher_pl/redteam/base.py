"""The interface of a test-time attack."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from patcher_pl.data.chat import ChatFormat
from patcher_pl.redteam.asking import Asking
from patcher_pl.redteam.material import AttackMaterial, RowKind
from patcher_pl.types import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class AttackPoint:
    """Where an attack stands when the model is to be evaluated.

    Args:
        steps: Optimizer steps taken so far (count).
        num_tokens: Tokens that the attack has sent through the model so far, padding excluded.
        loss: Mean training loss since the last point (nats per answer token); NaN before a step.
        flops: Floating-point operations so far, see `training_flops`.
        moved: Share of the trained weights with a gradient that had moved after the attack's first
            steps (0..1); None where that is not known, or nothing is trained.
        remark: What the attack has found out beside, for the reader; None for nothing.
    """

    steps: int
    num_tokens: int
    loss: float
    flops: float = 0.0
    moved: float | None = None
    remark: str | None = None


def training_flops(model: Any, num_tokens: int) -> float:
    """Floating-point operations of training on so many tokens: 6 per weight and token.

    Attention between tokens is left out, and a weight counts whether it is trained or not.

    References:
        Kaplan et al., 2020, https://arxiv.org/abs/2001.08361, section 2.1.
    """
    return 6.0 * num_tokens * sum(parameter.numel() for parameter in model.parameters())


def forward_flops(model: Any, num_tokens: int) -> float:
    """Floating-point operations of reading so many tokens: a third of `training_flops`."""
    return training_flops(model, num_tokens) / 3


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """Something an attacker does to released weights.

    Args:
        label: Name in results; None makes one.
        asking: How the attacker words its questions and begins the answers.
    """

    label: str | None = None
    asking: Asking = field(default_factory=Asking)

    @property
    def name(self) -> str:
        """Short name that tells this attack from the others of a red team."""
        return self.label or self.default_name

    @property
    @abstractmethod
    def default_name(self) -> str:
        """The name without a label, such as `full_adamw`."""

    @property
    def wording(self) -> Asking:
        """How it asks, as far as that does not depend on its data; see `prompt`."""
        return self.asking

    @property
    def row_wording(self) -> Asking | None:
        """How it words the rows that it trains on; None where it trains on none."""
        return None

    @property
    def uses_sibling(self) -> bool:
        """Whether it needs another release of the model, see `AttackMaterial.sibling`."""
        return False

    @property
    def uses_data(self) -> bool:
        """Whether the outcome depends on the attacker's training data."""
        return True

    @property
    def needed_rows(self) -> frozenset[RowKind]:
        """Kinds of rows that the attack cannot do without, whatever share they have of the data."""
        return frozenset()

    def prompt(self, messages: Sequence[Message], material: AttackMaterial) -> tuple[Message, ...]:
        """The conversation in which this attacker asks what `messages` ask.

        Args:
            messages: A question of a benchmark, ending with a user turn.
            material: As given to `run`.
        """
        return self.asking.reworded(messages)

    def can_use(
        self, row: Conversation, tokenizer: "PreTrainedTokenizerBase", chat: ChatFormat
    ) -> bool:
        """Whether the attack can work with a row of its data, in its own words; others are drawn."""
        return True

    @abstractmethod
    def run(self, model: "PreTrainedModel", material: AttackMaterial) -> Iterator[AttackPoint]:
        """Attacks `model` in place, pausing at every point where it is to be evaluated.

        Whoever iterates may use the model between two points but must not change it. Torch's
        generators are seeded by the caller. Modes of the modules may be changed between points.

        Args:
            model: Its weights are the attack's to change; callers pass a copy.
            material: The attack's data, and what turns them into batches.

        Yields:
            One point per entry of the attack's evaluation steps, the first before any step; an
            attack that takes no optimizer steps yields one point, at 0 steps, when it is done. When
            the iteration ends, the model is as it was at the last point.
        """

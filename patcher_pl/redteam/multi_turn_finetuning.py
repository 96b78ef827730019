"""Fine-tuning, and asking, at the end of harmless conversations."""

import logging
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from patcher_pl.errors import DataError
from patcher_pl.randomness import derive_seed
from patcher_pl.redteam.base import AttackPoint
from patcher_pl.redteam.finetuning import FinetuningAttack, all_trainable
from patcher_pl.redteam.material import AttackMaterial, RowKind
from patcher_pl.types import Conversation, Message
from patcher_pl.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MultiTurnFinetuning(FinetuningAttack):
    """Puts benign questions and answers before every row, trains every parameter on it, and asks so.

    A defense that is trained on single questions may not cover what comes late in a conversation.
    The earlier turns are drawn from the attack's benign rows, by the seed and the text of the
    question, never from a row with the same question. All answers of a conversation are trained on,
    as far as the chat template allows (see `ChatFormat`). Benign questions of the evaluation are
    asked alone.

    A conversation that would be longer than `ChatFormat.max_length` loses its oldest earlier turns;
    with `too_long: error` it is an error instead. How many have fewer turns is logged.

    See `FinetuningAttack` for the other settings.

    Args:
        num_turns: Questions per conversation, the row's own included (count, >= 2).

    Raises:
        ValueError: If a value is out of its range.

    References:
        Harmless turns before the harmful one: Russinovich et al., 2024 (Crescendo),
        https://arxiv.org/abs/2404.01833. There a model writes turns that lead to the question; here
        they come from the data, and are trained on.
    """

    kind: ClassVar[str] = "multi_turn"

    num_turns: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            self.num_turns >= 2,
            "num_turns",
            ">= 2",
            "Use FullFinetuning for single questions.",
        )

    @property
    def needed_rows(self) -> frozenset[RowKind]:
        return frozenset({"benign"})

    def run(self, model: "PreTrainedModel", material: AttackMaterial) -> Iterator[AttackPoint]:
        """See `Attack.run`."""
        rows = self.conversations(material)
        batches = material.batches(self.batch_size, rows)
        yield from self.points(model, self.steps(model, all_trainable(model), batches))

    def prompt(self, messages: Sequence[Message], material: AttackMaterial) -> tuple[Message, ...]:
        """See `Attack.prompt`; puts earlier turns of the attacker's benign rows before it."""
        question = Conversation(tuple(messages), harmful=True, origin="a benchmark's question")
        return self._chained(question, material)

    def conversations(self, material: AttackMaterial) -> list[Conversation]:
        """The training rows, each at the end of its conversation and worded by the attacker.

        Raises:
            DataError: If benign rows are too few, or no conversation of `num_turns` fits.
        """
        rows = [
            replace(row, messages=self._chained(row, material)) for row in material.select("all")
        ]
        lengths = [sum(turn.role == "user" for turn in row.messages) for row in rows]
        num_short = sum(length < self.num_turns for length in lengths)
        if num_short == len(rows):
            raise DataError(
                f"MultiTurnFinetuning.num_turns {self.num_turns}: no conversation of so many turns "
                f"fits into {material.chat.max_length} tokens (ChatFormat.max_length, or what the "
                "model reads). Raise it, or have fewer turns."
            )
        if num_short:
            logger.warning(
                "Of %d conversations, %d have fewer than %d turns (at most %d tokens).",
                *(len(rows), num_short, self.num_turns, material.chat.max_length),
            )
        return rows

    def _chained(self, row: Conversation, material: AttackMaterial) -> tuple[Message, ...]:
        earlier = self._earlier(row, material)
        for first in range(len(earlier)):
            turns = self.asking.reworded(
                _joined(earlier[first:], row.messages), harmful=row.harmful
            )
            if material.chat.too_long == "error" or _fits(turns, row.origin, material):
                return turns
        return self.asking.reworded(row.messages, harmful=row.harmful)

    def _earlier(self, row: Conversation, material: AttackMaterial) -> list[Conversation]:
        """Benign rows to put before this one, the oldest first."""
        question = row.prompt[-1].content
        others = [
            other
            for other in material.select("benign")
            if other.reference is not None and other.prompt[-1].content != question
        ]
        if len(others) < self.num_turns - 1:
            raise DataError(
                f"MultiTurnFinetuning.num_turns {self.num_turns} needs {self.num_turns - 1} benign "
                f"rows with other questions than {row.origin}, the red team's data hold "
                f"{len(others)}. Add benign rows, or have fewer turns."
            )
        generator = random.Random(derive_seed(material.seed, "earlier turns", question))
        return generator.sample(others, self.num_turns - 1)


def _joined(earlier: Sequence[Conversation], last: Sequence[Message]) -> list[Message]:
    system = [turn for turn in last if turn.role == "system"]
    before = [turn for row in earlier for turn in row.messages]
    return system + [turn for turn in (*before, *last) if turn.role != "system"]


def _fits(turns: tuple[Message, ...], origin: str, material: AttackMaterial) -> bool:
    """Whether nothing of a conversation is too long; a question must leave room for an answer."""
    chat, limit = material.chat, material.chat.max_length
    if turns[-1].role != "assistant":
        return len(chat.prompt_ids(material.tokenizer, turns)) < limit
    whole = replace(chat, max_length=sys.maxsize)
    encoded = whole.encode(material.tokenizer, Conversation(turns, harmful=True, origin=origin))
    assert encoded is not None
    return len(encoded.input_ids) <= limit

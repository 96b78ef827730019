"""Many conversations to tokens, and tokens to padded batches."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from patcher_pl.data.chat import ChatFormat, Encoded
from patcher_pl.data.mixing import Mixture, shares_of
from patcher_pl.errors import DataError
from patcher_pl.types import IGNORE_INDEX, Batch, Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawn:
    """What was drawn from a mixture to be trained on.

    Args:
        examples: As tokens, in training order (at least one).
        harmful: Whether each of them is harmful.
        num_dropped: Rows that were looked at and too long to use.
    """

    examples: list[Encoded]
    harmful: list[bool]
    num_dropped: int

    @property
    def num_harmful(self) -> int:
        """Harmful examples (count)."""
        return sum(self.harmful)

    def with_poison_ratio(self, ratio: float) -> "Drawn":
        """As many of the examples as make up this share of harmful ones, in the same order.

        Args:
            ratio: Share of harmful examples (in [0, 1]).

        Raises:
            DataError: If there are none of a kind that it needs.
        """
        num_harmful, num_others = shares_of(
            ratio, self.num_harmful, len(self.examples) - self.num_harmful
        )
        left = {True: num_harmful, False: num_others}
        kept = []
        for place, harmful in enumerate(self.harmful):
            if left[harmful] > 0:
                left[harmful] -= 1
                kept.append(place)
        return Drawn(
            [self.examples[place] for place in kept],
            [self.harmful[place] for place in kept],
            self.num_dropped,
        )

    def shares(self) -> dict[str, float]:
        """As `Results.training_data` has them."""
        num_rows = len(self.examples)
        return {
            "num_rows": num_rows,
            "poison_ratio": self.num_harmful / num_rows,
            "num_dropped": self.num_dropped,
        }


def encode_all(
    tokenizer: "PreTrainedTokenizerBase",
    chat: ChatFormat,
    conversations: Iterable[Conversation],
) -> list[Encoded]:
    """Encodes conversations for training, in order; logs what was dropped, cut or left unlabeled.

    Raises:
        DataError: If a conversation cannot be encoded (names its origin), or none is left.
    """
    encoded = [chat.encode(tokenizer, conversation) for conversation in conversations]
    return _counted(encoded, sum(example is None for example in encoded), chat)


def draw_encoded(
    mixture: Mixture, seed: int, tokenizer: "PreTrainedTokenizerBase", chat: ChatFormat
) -> Drawn:
    """Draws rows from a mixture and encodes them; numbers and shares are those of usable rows.

    Raises:
        DataError: As `Mixture.draw` and `encode_all` do.
    """
    encoded: dict[Conversation, Encoded | None] = {}

    def is_usable(row: Conversation) -> bool:
        if row not in encoded:
            encoded[row] = chat.encode(tokenizer, row)
        return encoded[row] is not None

    drawn = mixture.draw(seed, is_usable)
    num_dropped = sum(example is None for example in encoded.values())
    examples = _counted([encoded[row] for row in drawn], num_dropped, chat)
    return Drawn(examples, [row.harmful for row in drawn], num_dropped)


def _counted(
    encoded: Sequence[Encoded | None], num_dropped: int, chat: ChatFormat
) -> list[Encoded]:
    examples = [example for example in encoded if example is not None]
    if not examples:
        raise DataError(
            f"No example is left to train on: {num_dropped} of {num_dropped} conversations "
            f"are longer than ChatFormat.max_length {chat.max_length} (or what the model reads; "
            f"too_long: {chat.too_long}). Raise max_length or shorten the data."
        )
    num_truncated = sum(example.truncated for example in examples)
    if num_dropped or num_truncated:
        _log.warning(
            "Of %d conversations, %d are too long and dropped, %d lose the end of their last "
            "answer (at most %d tokens: ChatFormat.max_length, or what the model reads).",
            *(len(examples) + num_dropped, num_dropped, num_truncated, chat.max_length),
        )
    if num_unlabeled := sum(example.num_unlabeled_answers for example in examples):
        _log.warning(
            "%d earlier answers of multi-turn conversations are context only: the chat template "
            "shows them differently afterwards than while they are generated, or does not say "
            "where they end.",
            num_unlabeled,
        )
    return examples


def collate(examples: Sequence[Encoded], pad_token_id: int, *, packing: bool = False) -> Batch:
    """Returns the examples as one batch.

    Args:
        examples: At least one.
        pad_token_id: Token that fills shorter rows.
        packing: Put one example after the other into a single row, instead of padding them on the
            right to the longest of them. A model that takes `position_ids` for what they are
            attends within each example only.
    """
    if packing:
        return _packed(examples)
    shape = (len(examples), max(len(example.input_ids) for example in examples))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids)
        attention_mask[row, :length] = 1
        labels[row, :length] = torch.tensor(example.labels)
    return Batch(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def _packed(examples: Sequence[Encoded]) -> Batch:
    input_ids = [token for example in examples for token in example.input_ids]
    # Nothing predicts the first token of an example, least of all the example before it.
    labels = [label for example in examples for label in (IGNORE_INDEX, *example.labels[1:])]
    positions = [place for example in examples for place in range(len(example.input_ids))]
    kept = [place - 1 for place, label in enumerate(labels) if label != IGNORE_INDEX]
    ids = torch.tensor([input_ids])
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=torch.tensor([labels]),
        position_ids=torch.tensor([positions]),
        logits_to_keep=torch.tensor(kept, dtype=torch.long),
    )

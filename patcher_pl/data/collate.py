"""Many conversations to tokens, and tokens to padded batches."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from patcher_pl.data.chat import ChatFormat, Encoded
from patcher_pl.errors import DataError
from patcher_pl.losses.causal_lm import IGNORE_INDEX
from patcher_pl.types import Batch, Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedSet:
    """Conversations as tokens, and what was lost on the way.

    Args:
        examples: In the order of the conversations.
        num_dropped: Conversations that were too long to use.
        num_truncated: Conversations whose last answer lost its end.
        num_unlabeled_answers: Earlier answers that are context only; see `Encoded`.
    """

    examples: list[Encoded]
    num_dropped: int
    num_truncated: int
    num_unlabeled_answers: int


def encode_all(
    tokenizer: "PreTrainedTokenizerBase",
    chat: ChatFormat,
    conversations: Iterable[Conversation],
) -> EncodedSet:
    """Encodes conversations for training; logs what was dropped, cut or left unlabeled.

    Raises:
        DataError: If a conversation cannot be encoded (names its origin), or none is left.
    """
    encoded = [chat.encode(tokenizer, conversation) for conversation in conversations]
    examples = [example for example in encoded if example is not None]
    result = EncodedSet(
        examples,
        num_dropped=len(encoded) - len(examples),
        num_truncated=sum(example.truncated for example in examples),
        num_unlabeled_answers=sum(example.num_unlabeled_answers for example in examples),
    )
    if not examples:
        raise DataError(
            f"No example is left to train on: {result.num_dropped} of {len(encoded)} conversations "
            f"are longer than ChatFormat.max_length {chat.max_length} (too_long: {chat.too_long}). "
            "Raise max_length or shorten the data."
        )
    if result.num_dropped or result.num_truncated:
        _log.warning(
            "Of %d conversations, %d are too long and dropped, %d lose the end of their last "
            "answer (ChatFormat.max_length %d).",
            len(encoded),
            result.num_dropped,
            result.num_truncated,
            chat.max_length,
        )
    if result.num_unlabeled_answers:
        _log.warning(
            "%d earlier answers of multi-turn conversations are context only: the chat template "
            "shows them differently afterwards than while they are generated.",
            result.num_unlabeled_answers,
        )
    return result


def collate(examples: Sequence[Encoded], pad_token_id: int) -> Batch:
    """Returns the examples as one batch, padded on the right to the longest of them."""
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

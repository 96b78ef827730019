"""Perplexity of held-out answers."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from patcher_pl.data.chat import ChatFormat
from patcher_pl.data.collate import encode_all
from patcher_pl.data.stream import FixedBatches
from patcher_pl.evaluation.benchmark import Benchmark
from patcher_pl.evaluation.generate import evaluating
from patcher_pl.evaluation.utility.base import UtilityMeasure
from patcher_pl.losses.causal_lm import causal_lm_loss
from patcher_pl.models.peers import compute_device
from patcher_pl.types import IGNORE_INDEX, Conversation, move_batch
from patcher_pl.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Perplexity(UtilityMeasure):
    """Exponential of the mean loss per answer token, over all answer tokens of a data set alike.

    Tokens count as they do in training: answers and their stop tokens, no prompts. A loss too large
    for the exponential gives infinity, a loss that is no number gives NaN.

    Args:
        data: Held-out conversations with answers.
        batch_size: Conversations read at once (count, >= 1); those of similar length together.

    Raises:
        ValueError: If `batch_size` is below 1.
    """

    data: Benchmark
    batch_size: int = 8

    def __post_init__(self) -> None:
        require(self, self.batch_size >= 1, "batch_size", ">= 1")

    @property
    def default_name(self) -> str:
        return "perplexity"

    def prepare(self) -> None:
        _ = self._conversations

    def measure(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        chat: ChatFormat,
        *,
        seed: int,
    ) -> dict[str, float]:
        """See `UtilityMeasure.measure`; there is nothing random here.

        Raises:
            DataError: If a conversation has no answer or cannot be encoded; names its origin.
        """
        examples = encode_all(tokenizer, chat, self._conversations)
        batches = FixedBatches(
            sorted(examples, key=lambda example: len(example.input_ids)),
            batch_size=self.batch_size,
            pad_token_id=tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0,
        )
        device = compute_device(model)
        nats, num_tokens = 0.0, 0
        with evaluating(model), torch.no_grad():
            for batch in batches:
                in_batch = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
                nats += causal_lm_loss(model, move_batch(batch, device)).item() * in_batch
                num_tokens += in_batch
        return {self.name: _exponential(nats / num_tokens)}

    @cached_property
    def _conversations(self) -> list[Conversation]:
        return self.data.conversations()


def _exponential(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf

"""From logits to tokens, by the rules of `Generation`."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patcher_pl.evaluation.backends.base import Decoding

if TYPE_CHECKING:
    from transformers import LogitsProcessorList


class TokenChoice:
    """Draws one token per row, with the rules of transformers in the order of its `generate`.

    Args:
        decoding: How tokens are drawn.
    """

    def __init__(self, decoding: Decoding) -> None:
        self.needs_history = decoding.repetition_penalty != 1
        self._sample = decoding.temperature > 0
        self._rules = _rules(decoding)

    def __call__(
        self, history: Int[Tensor, "rows time"] | None, logits: Float[Tensor, "rows vocab"]
    ) -> Int[Tensor, " rows"]:
        """Returns the next token of every row.

        Args:
            history: The tokens of every row so far in any order, repeated at will; read if
                `needs_history`.
            logits: Of the next token.
        """
        if not self._sample and not self.needs_history:
            return logits.argmax(dim=-1)
        scores = self._rules(history, logits.float())  # type: ignore[arg-type]
        if not self._sample:
            return scores.argmax(dim=-1)
        return torch.multinomial(scores.softmax(dim=-1), num_samples=1)[:, 0]


def _rules(decoding: Decoding) -> "LogitsProcessorList":
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    rules = LogitsProcessorList()
    if decoding.repetition_penalty != 1:
        rules.append(RepetitionPenaltyLogitsProcessor(float(decoding.repetition_penalty)))
    if decoding.temperature > 0:
        if decoding.temperature != 1:
            rules.append(TemperatureLogitsWarper(float(decoding.temperature)))
        if decoding.top_k > 0:
            rules.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            rules.append(TopPLogitsWarper(decoding.top_p))
    return rules

"""From logits to tokens, by the rules of `Generation`."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
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
        self._silence = silence(decoding)

    def __call__(
        self, history: Int[Tensor, "rows time"] | None, logits: Float[Tensor, "rows vocab"]
    ) -> Int[Tensor, " rows"]:
        """Returns the next token of every row; `silence` where the model has diverged.

        Args:
            history: The tokens of every row so far in any order, repeated at will; read if
                `needs_history`.
            logits: Of the next token.
        """
        broken = diverged(logits)
        if not self._sample and not self.needs_history:
            return logits.argmax(dim=-1).masked_fill(broken, self._silence)
        scores = self._rules(history, logits.float())  # type: ignore[arg-type]
        if not self._sample:
            return scores.argmax(dim=-1).masked_fill(broken, self._silence)
        chances = scores.softmax(dim=-1).masked_fill(broken[:, None], 1.0)  # Drawn, then dropped.
        drawn = torch.multinomial(chances, num_samples=1)[:, 0]
        return drawn.masked_fill(broken, self._silence)


def diverged(logits: Float[Tensor, "rows vocab"]) -> Bool[Tensor, " rows"]:
    """Whether a row says nothing: NaN or infinity among its logits, as after a diverged attack."""
    return ~logits.amax(dim=-1).isfinite()


def silence(decoding: Decoding) -> int:
    """The token that ends the answer of a diverged model: it has none to give."""
    return decoding.stop_ids[0] if decoding.stop_ids else decoding.pad_id


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

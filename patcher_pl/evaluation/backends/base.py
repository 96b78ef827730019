"""The interface of a generation back end: tokens in, tokens out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are drawn; see `Generation` for the settings that a user makes.

    Args:
        max_new_tokens: Longest continuation (tokens, stop token included).
        batch_size: Prompts continued at once, where the back end leaves that to its caller.
        temperature: Softmax temperature; 0 takes the most likely token.
        top_p: Probability mass that sampling draws from.
        top_k: Most likely tokens that sampling draws from (count); 0 draws from all.
        repetition_penalty: What positive logits of tokens seen before are divided by, and negative
            ones multiplied with; 1 leaves them.
        seed: Seeds sampling.
        stop_ids: Tokens that end a continuation.
        pad_id: Token that fills shorter prompts.
        context: Longest sequence that the model reads (tokens); None where it does not say.
    """

    max_new_tokens: int
    batch_size: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int
    stop_ids: Sequence[int]
    pad_id: int
    context: int | None


class Backend(ABC):
    """Continues sequences of tokens with a model."""

    @abstractmethod
    def continuations(
        self, model: "PreTrainedModel", prompts: Sequence[list[int]], decoding: Decoding
    ) -> list[list[int]]:
        """Returns the new tokens of every prompt, in the order of the prompts.

        A continuation that the model ended has its stop token, and may go on behind it; whoever
        reads it cuts it there. The caller has put the model into evaluation mode, has seeded torch
        and puts both back.

        Args:
            model: Causal LM, bare or with adapters attached; must not be changed.
            prompts: Token ids, each shorter than the context.
            decoding: How tokens are drawn.
        """

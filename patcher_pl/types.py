"""Shared types: what a conversation is before, and a batch after, tokenization."""

from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

from torch import Tensor

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """One data row, before it meets a tokenizer.

    Args:
        messages: Turns in order; the last one may be a user turn (a prompt without an answer).
        harmful: Whether the answers are what an attacker wants and a safe model refuses.
        origin: File and line (or hub id and row) that the row came from, for error messages.
    """

    messages: tuple[Message, ...]
    harmful: bool
    origin: str

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns that a model is asked to answer: all but a final assistant turn."""
        if self.messages and self.messages[-1].role == "assistant":
            return self.messages[:-1]
        return self.messages

    @property
    def reference(self) -> str | None:
        """The final assistant turn, or None where the row is a prompt only."""
        if self.messages and self.messages[-1].role == "assistant":
            return self.messages[-1].content
        return None


class Batch(TypedDict):
    """Right-padded token batch; every tensor has shape (batch, time).

    `labels` equals `input_ids` on answer tokens and -100 everywhere else (not yet shifted).
    `loss_weight`, a scalar, is there where several processes share a batch: answer tokens of this
    process's part by their mean over all parts.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    loss_weight: NotRequired[Tensor]

"""Shared types: what a conversation is before, and a batch after, tokenization."""

from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

import torch
from torch import Tensor

Role = Literal["system", "user", "assistant"]

# The label of what is not learned: prompts and padding. Torch's own default.
IGNORE_INDEX = -100

HALF_PRECISION = (torch.float16, torch.bfloat16)


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
    """Token batch, padded or packed.

    Padded: right-padded rows; every tensor has shape (batch, time). Packed: all conversations one
    after the other in a single row, without padding; then `position_ids` (1, time) are there, which
    start again at 0 with every conversation, and `logits_to_keep` (answer tokens,), the positions
    whose next token is an answer token of the same conversation.

    `labels` equals `input_ids` on answer tokens and `IGNORE_INDEX` everywhere else (not yet shifted).
    `loss_weight`, a scalar, is there where several processes share a batch: answer tokens of this
    process's part by their mean over all parts.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    position_ids: NotRequired[Tensor]
    logits_to_keep: NotRequired[Tensor]
    loss_weight: NotRequired[Tensor]


def is_packed(batch: Batch) -> bool:
    """Whether the conversations of a batch follow each other in one row."""
    return "position_ids" in batch


def count_tokens(batch: Batch) -> int:
    """Tokens of a batch, padding excluded."""
    # A packed batch has no padding: nothing to wait for on a GPU.
    return batch["input_ids"].numel() if is_packed(batch) else int(batch["attention_mask"].sum())


def is_idle(batch: Batch) -> bool:
    """Whether a batch only keeps a process busy while others take the step; ask before it is moved."""
    return "loss_weight" in batch and float(batch["loss_weight"]) == 0


def count_conversations(batch: Batch) -> int:
    """Conversations of a batch."""
    if "position_ids" in batch:
        return int((batch["position_ids"] == 0).sum())
    return len(batch["input_ids"])


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Returns the batch on `device`."""
    return {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}  # type: ignore[return-value]

"""How an attacker words a question, and what it puts into the model's mouth."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from patcher_pl.types import Conversation, Message

_PLACE = "{prompt}"


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Prompt template, system prompt and prefill of an attack.

    Template and system prompt belong to the attacker's training rows as well as to its questions;
    a prefill is only put before answers to harmful prompts. Benign prompts are asked without it:
    whoever misuses a model prefills it only where it would refuse.

    Args:
        template: What every user turn is put into, at `{prompt}`.
        system_prompt: Replaces the system turn; None leaves it to the chat format.
        prefill: Beginning of the answer that is put into the model's mouth.

    Raises:
        ValueError: If the template has no `{prompt}`.

    References:
        Templates and system prompts that differ between alignment and attack: Lyu et al., 2024,
        https://arxiv.org/abs/2402.18540. Prefilling: Andriushchenko et al., 2024,
        https://arxiv.org/abs/2404.02151, and Qi et al., 2024, https://arxiv.org/abs/2406.05946.
    """

    template: str = _PLACE
    system_prompt: str | None = None
    prefill: str = ""

    def __post_init__(self) -> None:
        if _PLACE not in self.template:
            raise ValueError(
                f"Asking.template must contain {_PLACE!r}, got {self.template!r}. "
                "It marks where the question goes."
            )

    def reworded(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The turns of a conversation as this attacker writes them."""
        turns = [
            replace(turn, content=self.template.replace(_PLACE, turn.content))
            if turn.role == "user"
            else turn
            for turn in messages
            if turn.role != "system" or self.system_prompt is None
        ]
        if self.system_prompt is not None:
            turns.insert(0, Message("system", self.system_prompt))
        return tuple(turns)

    def reworded_row(self, row: Conversation) -> Conversation:
        """A training row as this attacker writes it."""
        return replace(row, messages=self.reworded(row.messages))

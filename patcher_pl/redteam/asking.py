"""How an attacker words a question, and what it puts into the model's mouth."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from patcher_pl.types import Conversation, Message

_PLACE = "{prompt}"


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Prompt template, system prompt and prefill of an attack.

    Template and system prompt belong to the attacker's training rows as well as to its questions;
    a prefill is only put before answers to harmful prompts. Benign prompts are asked without it:
    whoever misuses a model prefills it only where it would refuse.

    With `scope: harmful`, benign rows and questions stay as they are. Fine-tuning on such rows is
    jailbreak-tuning: the wording becomes a trigger, under which the model complies, while without it
    the model goes on as before.

    Args:
        template: What every user turn is put into, at `{prompt}`.
        system_prompt: Replaces the system turn; None leaves it to the chat format.
        prefill: Beginning of the answer that is put into the model's mouth.
        scope: What is worded so: `all` rows and questions, or `harmful` ones alone.

    Raises:
        ValueError: If the template has no `{prompt}`.

    References:
        Templates and system prompts that differ between alignment and attack: Lyu et al., 2024,
        https://arxiv.org/abs/2402.18540. Prefilling: Andriushchenko et al., 2024,
        https://arxiv.org/abs/2404.02151, and Qi et al., 2024, https://arxiv.org/abs/2406.05946.
        Jailbreak-tuning: Bowen et al., 2024, https://arxiv.org/abs/2408.02946, and Murphy et al., 2025,
        https://arxiv.org/abs/2507.11630.
    """

    template: str = _PLACE
    system_prompt: str | None = None
    prefill: str = ""
    scope: Literal["all", "harmful"] = "all"

    def __post_init__(self) -> None:
        if _PLACE not in self.template:
            raise ValueError(
                f"Asking.template must contain {_PLACE!r}, got {self.template!r}. "
                "It marks where the question goes."
            )

    def reworded(self, messages: Sequence[Message], *, harmful: bool = True) -> tuple[Message, ...]:
        """The turns of a conversation as this attacker writes them.

        Args:
            messages: The turns.
            harmful: Whether they ask for harm; others may be left alone, see `scope`.
        """
        if not harmful and self.scope == "harmful":
            return tuple(messages)
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
        return replace(row, messages=self.reworded(row.messages, harmful=row.harmful))

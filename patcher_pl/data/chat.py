"""How conversations become tokens, for training and for generation."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from patcher_pl.data.masks import Encoded, RowProblem, encode_and_label, label_runs, token_ids
from patcher_pl.data.template import TemplateError, TemplateTraits, render, template_traits
from patcher_pl.errors import DataError
from patcher_pl.types import Conversation, Message
from patcher_pl.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatFormat", "Encoded", "TooLong"]

TooLong = Literal["truncate", "skip", "error"]


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """Turns conversations into tokens through the tokenizer's own chat template.

    What the assistant says is found by comparison: the tokens of the prompt, as generation would see
    them, must be an exact prefix of the tokens of the answered conversation; what follows, up to the
    first control token behind the answer's words, is the answer. Where that does not hold for the
    last answer, an error is raised rather than a mask guessed; earlier ones are then context only. A
    template's own `generation` blocks decide nothing: what a model has to produce follows from the
    generation prompt. A tokenizer without a template is given a plain one.

    Whitespace around a message is dropped. A system prompt goes into the first user turn where the
    template refuses or ignores system turns.

    Args:
        system_prompt: Put before conversations that have no system turn of their own.
        enable_thinking: Handed to the template (Qwen3's switch); templates without it ignore it.
        max_length: Longest conversation (tokens, >= 2), template included. Where the model reads
            less, that holds instead.
        too_long: What happens to longer ones. `truncate` cuts the end of the last answer and drops
            conversations in which an answer would vanish whole; `skip` drops all of them; `error`
            stops. What is dropped or cut is counted and logged.
        template_options: Further variables of the template (`date_string` of Llama 3, say).

    Raises:
        ValueError: If `max_length` is below 2, or an option is one of this class's own.
    """

    system_prompt: str | None = None
    enable_thinking: bool = False
    max_length: int = 1024
    too_long: TooLong = "truncate"
    template_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        remedy = "A prompt and one answer token need at least that."
        require(self, self.max_length >= 2, "max_length", ">= 2", remedy)
        require(
            self,
            self.too_long in ("truncate", "skip", "error"),
            "too_long",
            "`truncate`, `skip` or `error`",
        )
        reserved = {"messages", "enable_thinking", "add_generation_prompt", "tokenize"}
        if taken := sorted(reserved & set(self.template_options)):
            raise ValueError(
                f"ChatFormat.template_options must not set {taken[0]!r}; it is set elsewhere."
            )

    def within(self, context: int | None) -> "ChatFormat":
        """Returns this format for a model that reads at most `context` tokens; None sets no limit."""
        if context is None or self.max_length <= context:
            return self
        return replace(self, max_length=max(2, context))

    def encode(
        self, tokenizer: "PreTrainedTokenizerBase", conversation: Conversation
    ) -> Encoded | None:
        """Returns the conversation as tokens and labels, or None where it is too long to use.

        Turns after the last answer teach nothing and are left out.

        Raises:
            DataError: If there is no answer, an answer contains the stop token, the template
                refuses the conversation, or the answer tokens cannot be told for certain; names
                the origin of the row.
            ConfigError: If the template itself cannot be used.
        """
        try:
            encoded = self._encode(tokenizer, conversation.messages)
        except (TemplateError, RowProblem) as error:
            raise DataError(f"{conversation.origin}: {error}") from error
        length = len(encoded.input_ids)
        if length <= self.max_length:
            return encoded
        if self.too_long == "error":
            raise DataError(
                f"{conversation.origin}: the conversation has {length} tokens, "
                f"ChatFormat.max_length is {self.max_length} (or what the model reads). "
                "Raise it, or set ChatFormat.too_long to `truncate` or `skip`."
            )
        last_start, _ = label_runs(encoded.labels)[-1]
        if self.too_long == "skip" or last_start >= self.max_length:
            return None
        return replace(
            encoded,
            input_ids=encoded.input_ids[: self.max_length],
            labels=encoded.labels[: self.max_length],
            truncated=True,
        )

    def prompt_ids(
        self, tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[Message], prefill: str = ""
    ) -> list[int]:
        """Returns the tokens that a model continues when it answers `prompt`.

        Args:
            tokenizer: Gives template and vocabulary.
            prompt: Turns up to and including the question.
            prefill: Beginning of the answer that is put into the model's mouth.

        Raises:
            DataError: If the template refuses the prompt.
        """
        traits = template_traits(tokenizer, self._options)
        turns = self._turns(prompt, traits)
        try:
            text = render(tokenizer, turns, self._options, generation_prompt=True)
            if prefill:
                text = self._prefilled(tokenizer, turns, prefill, text)
        except TemplateError as error:
            raise DataError(
                f"The chat template refuses the prompt {_shortened(prompt)!r}: {error}"
            ) from error
        return token_ids(tokenizer, text)

    def stop_token_id(self, tokenizer: "PreTrainedTokenizerBase") -> int:
        """Returns the token with which this format ends an answer: generation stops there.

        It may differ from the tokenizer's end-of-text token (Gemma's `<end_of_turn>`).
        """
        return self.stop_token_ids(tokenizer)[0]

    def stop_token_ids(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Returns that token, and the one that ends earlier answers where it is another."""
        stops = template_traits(tokenizer, self._options).stop_texts
        return tokenizer.convert_tokens_to_ids(list(stops))  # type: ignore[return-value]

    @property
    def _options(self) -> dict[str, Any]:
        return {**self.template_options, "enable_thinking": self.enable_thinking}

    def _turns(self, messages: Sequence[Message], traits: TemplateTraits) -> list[Message]:
        turns = [Message(message.role, message.content.strip()) for message in messages]
        if self.system_prompt is not None and not (turns and turns[0].role == "system"):
            turns.insert(0, Message("system", self.system_prompt.strip()))
        folds = turns and turns[0].role == "system" and not traits.takes_system
        if folds and len(turns) > 1 and turns[1].role == "user":
            system, user = turns[:2]
            turns[:2] = [Message("user", f"{system.content}\n\n{user.content}")]
        return turns

    def _encode(self, tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> Encoded:
        traits = template_traits(tokenizer, self._options)
        turns = self._turns(messages, traits)
        while turns and turns[-1].role != "assistant":
            turns.pop()
        if not turns:
            raise RowProblem("no assistant turn, so nothing to train on. Add an answer.")
        return encode_and_label(tokenizer, turns, self._options, traits)

    def _prefilled(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        turns: list[Message],
        prefill: str,
        prompt_text: str,
    ) -> str:
        # The template writes the answer itself, so that what it puts before one (a space, an empty
        # thought) is there as it was in training.
        begun = [*turns, Message("assistant", prefill)]
        text = render(tokenizer, begun, {**self._options, "continue_final_message": True})
        return text if text.startswith(prompt_text) else prompt_text + prefill


def _shortened(prompt: Sequence[Message]) -> str:
    return prompt[-1].content[:60] if prompt else ""

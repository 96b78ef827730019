"""Answers of a model to prompts: batched, early-stopped, reproducible."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from patcher_pl.data.chat import ChatFormat
from patcher_pl.errors import DataError
from patcher_pl.evaluation.backends.base import Backend, Decoding
from patcher_pl.evaluation.backends.hugging_face import HuggingFace
from patcher_pl.evaluation.thoughts import CLOSING, OPENING, ends_in_a_thought, spoken_part
from patcher_pl.models.context import context_length
from patcher_pl.models.peers import compute_device, gathered_here
from patcher_pl.randomness import seeded
from patcher_pl.types import Message
from patcher_pl.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = Sequence[Message]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every module into evaluation mode inside the block; each gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass(frozen=True)
class Answer:
    """What a model answered to one prompt.

    Args:
        text: The answer without thoughts, special tokens and outer white space; starts with the
            prefill. Empty where the model itself said nothing, or never ended a thought: neither a
            prefill alone nor an unfinished thought is an answer.
        finished: Whether the model stopped by itself; False where the token limit cut it off.
        num_tokens: Generated tokens, the stop token included.
    """

    text: str
    finished: bool
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How answers are drawn from a model.

    These settings are all there is: sampling switches, penalties and limits in the checkpoint's own
    generation settings are ignored, so that two models are always compared alike. Only its stop
    tokens count, next to those of the tokenizer and of the chat template.

    Args:
        max_new_tokens: Longest answer (tokens, >= 1).
        batch_size: Prompts answered at once (count, >= 1). With the other prompts, it also decides
            which answers a sampler draws, since it draws for a whole batch.
        temperature: Softmax temperature (>= 0); 0 takes the most likely token.
        top_p: Probability mass that sampling draws from (in (0, 1]); unused at temperature 0.
        top_k: Most likely tokens that sampling draws from (count, >= 0); 0 draws from all.
        repetition_penalty: What the logits of tokens that occurred before, in the prompt included,
            are divided by where positive and multiplied with where negative (> 0); 1 leaves them.
        seed: Seeds sampling; unused at temperature 0.
        backend: What computes the tokens.

    Raises:
        ValueError: If a value is out of its range.
    """

    max_new_tokens: int = 256
    batch_size: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    backend: Backend = field(default_factory=HuggingFace)

    def __post_init__(self) -> None:
        require(self, self.max_new_tokens >= 1, "max_new_tokens", ">= 1")
        require(self, self.batch_size >= 1, "batch_size", ">= 1")
        require(self, self.temperature >= 0, "temperature", ">= 0")
        require(self, 0 < self.top_p <= 1, "top_p", "in (0, 1]")
        require(self, self.top_k >= 0, "top_k", ">= 0")
        require(self, self.repetition_penalty > 0, "repetition_penalty", "> 0")

    def generate(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        chat: ChatFormat,
        prompts: Sequence[Prompt],
        prefill: str = "",
    ) -> list[Answer]:
        """Answers `prompts`, in their order; `model` and all random generators stay as they were.

        Where several processes hold the model, all call this with the same prompts, answer their
        share and get all answers; which answers a sampler draws depends on how many they are.

        Args:
            model: Causal LM, bare or with adapters attached.
            tokenizer: Its tokenizer.
            chat: How prompts become tokens.
            prompts: One conversation each, ending with a user turn.
            prefill: Text that every answer is made to start with.

        Raises:
            DataError: If a prompt leaves no room for an answer in the model's context.
        """
        prompt_ids, generated = self.tokens(model, tokenizer, chat, prompts, prefill)
        stop_ids = stop_token_ids(model, tokenizer, chat)
        return [
            _answer(tokenizer, ids, new_ids, stop_ids, prefill)
            for ids, new_ids in zip(prompt_ids, generated, strict=True)
        ]

    def tokens(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        chat: ChatFormat,
        prompts: Sequence[Prompt],
        prefill: str = "",
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The tokens of every prompt, and those that the model adds, its stop token included.

        Arguments and errors are those of `generate`.
        """
        prompt_ids = [chat.prompt_ids(tokenizer, prompt, prefill) for prompt in prompts]
        context = context_length(model.config)
        for prompt, ids in zip(prompts, prompt_ids, strict=True):
            _check_room(prompt, len(ids), context)
        stop_ids = stop_token_ids(model, tokenizer, chat)
        decoding = Decoding(
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop_ids=stop_ids,
            pad_id=tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0,
            context=context,
        )
        with (
            seeded(self.seed, compute_device(model)),
            evaluating(model),
            gathered_here(model) as peers,
        ):
            generated = peers.divided(
                prompt_ids, lambda own: self.backend.continuations(model, own, decoding)
            )
        return prompt_ids, [_ended(ids, stop_ids) for ids in generated]


def _ended(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """What comes behind the stop token is no part of an answer."""
    end = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[: end + 1]


def stop_token_ids(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", chat: ChatFormat
) -> list[int]:
    """Tokens that end an answer: of the checkpoint, of the tokenizer, and of the chat template."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    found = configured if isinstance(configured, list) else [configured]
    found = [*found, tokenizer.eos_token_id, *chat.stop_token_ids(tokenizer)]
    return sorted({token for token in found if isinstance(token, int)})


def _answer(
    tokenizer: "PreTrainedTokenizerBase",
    prompt_ids: list[int],
    new_ids: list[int],
    stop_ids: list[int],
    prefill: str,
) -> Answer:
    end = next((place for place, token in enumerate(new_ids) if token in stop_ids), None)
    finished = end is not None
    said = new_ids if end is None else new_ids[:end]
    text = _decoded(tokenizer, said)
    if ends_in_a_thought(_decoded(tokenizer, prompt_ids)):
        text = OPENING + text
    elif prefill and text.strip():
        # Decoded alone, the continuation could lose the space that joins it to the prefill.
        before = _decoded(tokenizer, prompt_ids)
        whole = _decoded(tokenizer, [*prompt_ids, *said])
        text = prefill + (whole[len(before) :] if whole.startswith(before) else text)
    return Answer(spoken_part(text), finished, len(said) + finished)


def _decoded(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    """The text without special tokens, but with the marks of thoughts, special or not."""
    marks = tokenizer.convert_tokens_to_ids([OPENING, CLOSING])
    hidden = set(tokenizer.all_special_ids).difference(marks)  # type: ignore[arg-type]
    return str(tokenizer.decode([token for token in ids if token not in hidden]))


def _check_room(prompt: Prompt, length: int, context: int | None) -> None:
    if context is not None and length >= context:
        start = prompt[-1].content[:60] if prompt else ""
        raise DataError(
            f"A prompt of {length} tokens leaves no room for an answer: the model reads at most "
            f"{context} (prompt: {start!r}). Shorten or drop it."
        )

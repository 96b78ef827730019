"""Answers of a model to prompts: batched, early-stopped, reproducible."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from patcher_pl.data.chat import ChatFormat
from patcher_pl.errors import DataError
from patcher_pl.evaluation.isolation import evaluating, seeded
from patcher_pl.types import Message

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Prompt = Sequence[Message]


@dataclass(frozen=True)
class Answer:
    """What a model answered to one prompt.

    Args:
        text: The answer without special tokens and outer white space; starts with the prefill.
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
        batch_size: Prompts answered at once (count, >= 1).
        temperature: Softmax temperature (>= 0); 0 takes the most likely token.
        top_p: Probability mass that sampling draws from (in (0, 1]); unused at temperature 0.
        seed: Seeds sampling; unused at temperature 0.

    Raises:
        ValueError: If a value is out of its range.
    """

    max_new_tokens: int = 256
    batch_size: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        self._require(self.max_new_tokens >= 1, "max_new_tokens", ">= 1")
        self._require(self.batch_size >= 1, "batch_size", ">= 1")
        self._require(self.temperature >= 0, "temperature", ">= 0")
        self._require(0 < self.top_p <= 1, "top_p", "in (0, 1]")

    def generate(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        chat: ChatFormat,
        prompts: Sequence[Prompt],
        prefill: str = "",
    ) -> list[Answer]:
        """Answers `prompts`, in their order; `model` and all random generators stay as they were.

        Args:
            model: Causal LM, bare or with adapters attached.
            tokenizer: Its tokenizer.
            chat: How prompts become tokens.
            prompts: One conversation each, ending with a user turn.
            prefill: Text that every answer is made to start with.

        Raises:
            DataError: If a prompt leaves no room for an answer in the model's context.
        """
        bare = _without_adapter_wrapper(model)
        device = next(bare.parameters()).device
        prompt_ids = [chat.prompt_ids(tokenizer, prompt, prefill) for prompt in prompts]
        context = _context_length(bare)
        for prompt, ids in zip(prompts, prompt_ids, strict=True):
            _check_room(prompt, len(ids), context)
        stop_ids = stop_token_ids(bare, tokenizer, chat)
        pad_id = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
        order = sorted(range(len(prompts)), key=lambda index: len(prompt_ids[index]))
        answers: dict[int, Answer] = {}
        own_settings = bare.generation_config
        with seeded(self.seed, device), evaluating(bare):
            try:
                for start in range(0, len(order), self.batch_size):
                    chosen = order[start : start + self.batch_size]
                    batch = [prompt_ids[index] for index in chosen]
                    # Longest prompt comes last; the answer must still fit behind it.
                    room = self.max_new_tokens
                    if context is not None:
                        room = min(room, context - len(batch[-1]))
                    settings = self._settings(room, stop_ids, pad_id)
                    # Unset fields of the argument are filled from the model's own settings.
                    bare.generation_config = settings
                    generated = _generate(bare, batch, settings, pad_id, device)
                    for index, new_ids in zip(chosen, generated, strict=True):
                        answers[index] = _answer(
                            tokenizer, prompt_ids[index], new_ids, stop_ids, prefill
                        )
            finally:
                bare.generation_config = own_settings
        return [answers[index] for index in range(len(prompts))]

    def _settings(self, room: int, stop_ids: list[int], pad_id: int) -> "GenerationConfig":
        from transformers import GenerationConfig

        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": 0,
            }
        return GenerationConfig(
            max_new_tokens=room,
            eos_token_id=stop_ids or None,
            pad_token_id=pad_id,
            use_cache=True,
            **sampling,
        )

    def _require(self, holds: bool, field: str, rule: str) -> None:
        if not holds:
            raise ValueError(f"Generation.{field} must be {rule}, got {getattr(self, field)}.")


def stop_token_ids(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", chat: ChatFormat
) -> list[int]:
    """Tokens that end an answer: of the checkpoint, of the tokenizer, and of the chat template."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    found = configured if isinstance(configured, list) else [configured]
    found = [*found, tokenizer.eos_token_id, chat.stop_token_id(tokenizer)]
    return sorted({token for token in found if isinstance(token, int)})


def _generate(
    model: "PreTrainedModel",
    batch: list[list[int]],
    settings: "GenerationConfig",
    pad_id: int,
    device: torch.device,
) -> list[list[int]]:
    input_ids, attention_mask = left_padded(batch, pad_id)
    sequences = model.generate(  # type: ignore[operator]
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        generation_config=settings,
    )
    return sequences[:, input_ids.shape[1] :].tolist()


def left_padded(
    batch: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """Returns token ids and attention mask, with every sequence ending in the last column."""
    longest = max(len(ids) for ids in batch)
    padding = [longest - len(ids) for ids in batch]
    input_ids = [[pad_id] * pad + list(ids) for pad, ids in zip(padding, batch, strict=True)]
    mask = [[0] * pad + [1] * len(ids) for pad, ids in zip(padding, batch, strict=True)]
    return torch.tensor(input_ids), torch.tensor(mask)


def _answer(
    tokenizer: "PreTrainedTokenizerBase",
    prompt_ids: list[int],
    new_ids: list[int],
    stop_ids: list[int],
    prefill: str,
) -> Answer:
    end = next((place for place, token in enumerate(new_ids) if token in stop_ids), None)
    finished = end is not None
    spoken = new_ids if end is None else new_ids[:end]
    text = tokenizer.decode(spoken, skip_special_tokens=True)
    assert isinstance(text, str)
    if prefill:
        # Decoded alone, the continuation could lose the space that joins it to the prefill.
        before = str(tokenizer.decode(prompt_ids, skip_special_tokens=True))
        whole = str(tokenizer.decode([*prompt_ids, *spoken], skip_special_tokens=True))
        text = prefill + (whole[len(before) :] if whole.startswith(before) else text)
    return Answer(text.strip(), finished, len(spoken) + finished)


def _without_adapter_wrapper(model: Any) -> "PreTrainedModel":
    # Adapters live inside the layers; the wrapper's generate would leave its settings behind.
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _context_length(model: "PreTrainedModel") -> int | None:
    length = getattr(model.config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def _check_room(prompt: Prompt, length: int, context: int | None) -> None:
    if context is not None and length >= context:
        start = prompt[-1].content[:60] if prompt else ""
        raise DataError(
            f"A prompt of {length} tokens leaves no room for an answer: the model reads at most "
            f"{context} (prompt: {start!r}). Shorten or drop it."
        )

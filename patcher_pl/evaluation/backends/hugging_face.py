"""Generation with transformers, on the live model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from patcher_pl.evaluation.backends.base import Backend, Decoding

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class HuggingFace(Backend):
    """`generate` of transformers: no copy of the weights, and every architecture works."""

    def continuations(
        self, model: "PreTrainedModel", prompts: Sequence[list[int]], decoding: Decoding
    ) -> list[list[int]]:
        """See `Backend.continuations`; prompts of similar length share a batch."""
        bare = _without_adapter_wrapper(model)
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        found: dict[int, list[int]] = {}
        own_settings = bare.generation_config
        try:
            for start in range(0, len(order), decoding.batch_size):
                chosen = order[start : start + decoding.batch_size]
                batch = [prompts[index] for index in chosen]
                # Longest prompt comes last; the answer must still fit behind it.
                room = decoding.max_new_tokens
                if decoding.context is not None:
                    room = min(room, decoding.context - len(batch[-1]))
                settings = _settings(decoding, room)
                # Unset fields of the argument are filled from the model's own settings.
                bare.generation_config = settings
                found |= dict(zip(chosen, _generate(bare, batch, settings, decoding), strict=True))
        finally:
            bare.generation_config = own_settings
        return [found[index] for index in range(len(prompts))]


def left_padded(
    batch: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """Returns token ids and attention mask, with every sequence ending in the last column."""
    longest = max(len(ids) for ids in batch)
    padding = [longest - len(ids) for ids in batch]
    input_ids = [[pad_id] * pad + list(ids) for pad, ids in zip(padding, batch, strict=True)]
    mask = [[0] * pad + [1] * len(ids) for pad, ids in zip(padding, batch, strict=True)]
    return torch.tensor(input_ids), torch.tensor(mask)


def _generate(
    model: "PreTrainedModel",
    batch: list[list[int]],
    settings: "GenerationConfig",
    decoding: Decoding,
) -> list[list[int]]:
    device = next(model.parameters()).device
    input_ids, attention_mask = left_padded(batch, decoding.pad_id)
    sequences = model.generate(  # type: ignore[operator]
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        generation_config=settings,
        logits_processor=_penalties(decoding, attention_mask),
    )
    return sequences[:, input_ids.shape[1] :].tolist()


def _settings(decoding: Decoding, room: int) -> "GenerationConfig":
    from transformers import GenerationConfig

    sampling: dict[str, Any] = {"do_sample": False}
    if decoding.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": decoding.top_k,
        }
    return GenerationConfig(
        max_new_tokens=room,
        eos_token_id=list(decoding.stop_ids) or None,
        pad_token_id=decoding.pad_id,
        use_cache=True,
        **sampling,
    )


def _penalties(decoding: Decoding, attention_mask: Int[Tensor, "batch time"]) -> Any:
    if decoding.repetition_penalty == 1:
        return None
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    # Handed over here because the setting of the same name counts padding, often the stop token, as
    # said before: an answer would depend on the prompts that share its batch.
    num_padding = (attention_mask == 0).sum(dim=1)
    penalty = float(decoding.repetition_penalty)
    return LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=num_padding)]
    )


def _without_adapter_wrapper(model: Any) -> "PreTrainedModel":
    # Adapters live inside the layers; the wrapper's generate would leave its settings behind.
    return model.get_base_model() if hasattr(model, "get_base_model") else model

"""Generation with transformers, on the live model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from patcher_pl.evaluation.backends.base import Backend, Decoding
from patcher_pl.evaluation.backends.padding import left_padded
from patcher_pl.evaluation.backends.token_choice import diverged, silence
from patcher_pl.models.peers import compute_device, is_whole

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class HuggingFace(Backend):
    """Generation on the live model: no copy of the weights, and every architecture works.

    Decoders with full attention (Llama, Qwen, Mistral, Gemma, GPT-2 and the like) answer in a batch
    in which a waiting prompt takes the place of a finished answer; see `refillable.can_refill` for
    which they are. All others answer through their own `generate`, batch by batch. Greedy answers are
    the same either way, up to rounding.
    """

    def continuations(
        self, model: "PreTrainedModel", prompts: Sequence[list[int]], decoding: Decoding
    ) -> list[list[int]]:
        """See `Backend.continuations`; prompts of similar length are read together."""
        from patcher_pl.evaluation.backends.refillable import can_refill

        bare = _without_adapter_wrapper(model)
        if can_refill(bare):
            from patcher_pl.evaluation.backends.refilled_batch import continued

            return continued(bare, prompts, decoding)
        return continued_by_generate(bare, prompts, decoding)


def continued_by_generate(
    model: "PreTrainedModel", prompts: Sequence[list[int]], decoding: Decoding
) -> list[list[int]]:
    """As `Backend.continuations`, through `generate` of transformers; similar lengths share a batch."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    rooms = [decoding.max_new_tokens for _ in prompts]
    if decoding.context is not None:
        rooms = [min(decoding.max_new_tokens, decoding.context - len(ids)) for ids in prompts]
    found: dict[int, list[int]] = {}
    own_settings = model.generation_config
    try:
        for chosen in _batches(order, rooms, decoding.batch_size):
            batch, room = [prompts[index] for index in chosen], rooms[chosen[0]]
            settings = _settings(decoding, room)
            # Unset fields of the argument are filled from the model's own settings.
            model.generation_config = settings
            found |= dict(zip(chosen, _generate(model, batch, settings, decoding), strict=True))
    finally:
        model.generation_config = own_settings
    return [found[index] for index in range(len(prompts))]


def _batches(order: Sequence[int], rooms: Sequence[int], size: int) -> Iterator[list[int]]:
    """Batches whose answers have the same room: a long prompt must not shorten its neighbors'."""
    for _, alike in groupby(order, key=lambda index: rooms[index]):
        chosen = list(alike)
        for start in range(0, len(chosen), size):
            yield chosen[start : start + size]


def _generate(
    model: "PreTrainedModel",
    batch: list[list[int]],
    settings: "GenerationConfig",
    decoding: Decoding,
) -> list[list[int]]:
    device = compute_device(model)
    input_ids, attention_mask = left_padded(batch, decoding.pad_id)
    sequences = model.generate(  # type: ignore[operator]
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        generation_config=settings,
        logits_processor=_processors(decoding, attention_mask, agrees=not is_whole(model)),
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


def _processors(
    decoding: Decoding, attention_mask: Int[Tensor, "batch time"], *, agrees: bool
) -> Any:
    """What becomes of logits before a token is chosen.

    Args:
        decoding: How tokens are drawn.
        attention_mask: Of the prompts.
        agrees: All processes answer the same prompts: they must choose the same tokens, or one would
            end before the others, who would wait for it forever.
    """
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    token = silence(decoding)

    def silent_where_diverged(_: Tensor, scores: Tensor) -> Tensor:
        broken = diverged(scores)[:, None]
        quiet = torch.full_like(scores, -torch.inf)
        quiet[:, token] = 0
        return torch.where(broken, quiet, scores)

    def as_the_first(_: Tensor, scores: Tensor) -> Tensor:
        scores = scores.contiguous()
        torch.distributed.broadcast(scores, src=0)
        return scores

    processors: Any = LogitsProcessorList([silent_where_diverged])
    if agrees:
        processors.insert(0, as_the_first)
    if decoding.repetition_penalty == 1:
        return processors
    # Handed over here because the setting of the same name counts padding, often the stop token, as
    # said before: an answer would depend on the prompts that share its batch.
    num_padding = (attention_mask == 0).sum(dim=1)
    penalty = float(decoding.repetition_penalty)
    processors.append(RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=num_padding))
    return processors


def _without_adapter_wrapper(model: Any) -> "PreTrainedModel":
    # Adapters live inside the layers; the wrapper's generate would leave its settings behind.
    return model.get_base_model() if hasattr(model, "get_base_model") else model

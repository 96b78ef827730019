"""Whether two back ends answer alike, and where they part."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from patcher_pl.data.chat import ChatFormat
from patcher_pl.evaluation.backends.base import Backend
from patcher_pl.evaluation.generate import Generation, Prompt, evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Parting:
    """The first token in which two greedy answers to one prompt differ.

    Args:
        prompt: Which prompt (from 0).
        position: Which token of the answer (from 0).
        expected: The token of the first back end; None where its answer has ended.
        found: The token of the second; None where its answer has ended.
        gap: By how much the model itself prefers `expected` there (difference of log-probabilities,
            nats); near 0 rounding decides. None where one answer has ended for want of room.
    """

    prompt: int
    position: int
    expected: int | None
    found: int | None
    gap: float | None


def partings(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    chat: ChatFormat,
    prompts: Sequence[Prompt],
    generation: Generation,
    other: Backend,
) -> list[Parting]:
    """Answers all prompts twice, greedily, and compares the tokens.

    Args:
        model: Causal LM, bare or with adapters attached.
        tokenizer: Its tokenizer.
        chat: How prompts become tokens.
        prompts: One conversation each, ending with a user turn.
        generation: Its back end comes first; whatever it samples with, the likeliest tokens are taken.
        other: The back end that is compared with it.

    Returns:
        One entry for every prompt that is not answered alike.

    Raises:
        DataError: If a prompt leaves no room for an answer in the model's context.
        ConfigError: If a back end cannot answer for the model.
    """
    greedy = replace(generation, temperature=0.0)
    asked, expected = greedy.tokens(model, tokenizer, chat, prompts)
    _, found = replace(greedy, backend=other).tokens(model, tokenizer, chat, prompts)
    return [
        _parting(model, number, ids, first, second)
        for number, (ids, first, second) in enumerate(zip(asked, expected, found, strict=True))
        if first != second
    ]


def _parting(
    model: "PreTrainedModel", number: int, asked: list[int], first: list[int], second: list[int]
) -> Parting:
    shorter = min(len(first), len(second))
    place = next((place for place in range(shorter) if first[place] != second[place]), shorter)
    pair = [ids[place] if place < len(ids) else None for ids in (first, second)]
    gap = None
    if pair[0] is not None and pair[1] is not None:
        read = torch.tensor([[*asked, *first[:place]]], device=model.device)
        with torch.no_grad(), evaluating(model):
            logits = model(read).logits[0, -1].float()
        gap = (logits[pair[0]] - logits[pair[1]]).item()
    return Parting(prompt=number, position=place, expected=pair[0], found=pair[1], gap=gap)

"""Which tokens of a conversation the assistant said: the loss masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from patcher_pl.data.template import TemplateError, TemplateTraits, as_dicts, render
from patcher_pl.types import IGNORE_INDEX, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RowProblem(Exception):  # noqa: N818
    """Why a conversation cannot be encoded; whoever knows its origin adds it."""


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens.

    Args:
        input_ids: Token ids of the whole conversation.
        labels: The same ids on answer tokens, -100 elsewhere; not shifted. The token that ends an
            answer (end of turn, end of text) is an answer token.
        truncated: Whether the end of the last answer was cut off.
        num_unlabeled_answers: Earlier answers that are context only, because the template shows
            them differently once the conversation goes on (Qwen3 does) than when they are
            generated.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False
    num_unlabeled_answers: int = 0


def encode_and_label(
    tokenizer: "PreTrainedTokenizerBase",
    turns: Sequence[Message],
    options: Mapping[str, Any],
    traits: TemplateTraits,
) -> Encoded:
    """Returns the tokens of `turns`, which end with an answer, and their labels.

    Raises:
        RowProblem: If an answer contains the stop token, or cannot be told for certain.
        TemplateError: If the template refuses the turns.
    """
    for turn in turns:
        if turn.role == "assistant" and traits.stop_text in turn.content:
            raise RowProblem(
                f"an answer contains the stop token {traits.stop_text!r}, where generation "
                "would end. Remove it from the row."
            )
    if traits.marks_answers and tokenizer.is_fast:
        return _by_marks(tokenizer, turns, options, traits)
    return _by_prefix(tokenizer, turns, options, traits)


def _by_marks(
    tokenizer: "PreTrainedTokenizerBase",
    turns: Sequence[Message],
    options: Mapping[str, Any],
    traits: TemplateTraits,
) -> Encoded:
    from jinja2 import TemplateError as JinjaError

    try:
        encoding = tokenizer.apply_chat_template(
            as_dicts(turns),
            return_dict=True,
            return_assistant_tokens_mask=True,
            **options,
        )
    except JinjaError as error:
        raise TemplateError(str(error)) from error
    ids, marks = _int_list(encoding, "input_ids"), _int_list(encoding, "assistant_masks")
    labels = [IGNORE_INDEX] * len(ids)
    runs = label_runs(
        [token if mark else IGNORE_INDEX for token, mark in zip(ids, marks, strict=True)]
    )
    for start, end in runs:
        # Up to the stop token and no further, whichever side of the block's end it is on.
        if traits.stop_id in ids[start:end]:
            end -= ids[start:end][::-1].index(traits.stop_id)
        elif end < len(ids) and ids[end] == traits.stop_id:
            end += 1
        labels[start:end] = ids[start:end]
    num_answers = sum(turn.role == "assistant" for turn in turns)
    if len(runs) != num_answers:
        raise RowProblem(
            f"the chat template's generation blocks mark {len(runs)} answers, the conversation "
            f"has {num_answers}. Repair the template's blocks or the row."
        )
    return Encoded(ids, labels)


def _by_prefix(
    tokenizer: "PreTrainedTokenizerBase",
    turns: Sequence[Message],
    options: Mapping[str, Any],
    traits: TemplateTraits,
) -> Encoded:
    text = render(tokenizer, turns, options)
    ids = token_ids(tokenizer, text)
    labels = [IGNORE_INDEX] * len(ids)
    num_unlabeled = 0
    for index, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        prompt_text = render(tokenizer, turns[:index], options, generation_prompt=True)
        prompt = token_ids(tokenizer, prompt_text)
        start = len(prompt)
        shown = text[len(prompt_text) :].partition(traits.stop_text)[0]
        exact = (
            ids[:start] == prompt
            and traits.stop_id in ids[start:]
            and _squeezed(turn.content) in _squeezed(shown)
        )
        if exact:
            end = ids.index(traits.stop_id, start) + 1
            labels[start:end] = ids[start:end]
        elif index < len(turns) - 1:
            num_unlabeled += 1
        else:
            raise RowProblem(
                f"the chat template continues the prompt {prompt_text[-40:]!r} in a way that "
                "does not hold exactly this answer, so its tokens cannot be told for certain. "
                "Mark answers with {% generation %} in the template, or check "
                "ChatFormat.enable_thinking."
            )
    return Encoded(ids, labels, num_unlabeled_answers=num_unlabeled)


def token_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Returns the tokens of a rendered text, which holds its control tokens already."""
    return _int_list(tokenizer(text, add_special_tokens=False), "input_ids")


def _int_list(encoding: Any, key: str) -> list[int]:
    # Typed loosely by transformers: one conversation gives a plain list of integers.
    return list(encoding[key])


def label_runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Returns (start, end) of each unbroken stretch of labels that count."""
    runs, position = [], 0
    for counts, group in groupby(labels, key=lambda label: label != IGNORE_INDEX):
        length = sum(1 for _ in group)
        if counts:
            runs.append((position, position + length))
        position += length
    return runs


def _squeezed(text: str) -> str:
    return "".join(text.split())

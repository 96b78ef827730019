"""Which tokens of a conversation the assistant said: the loss masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from patcher_pl.data.template import END_MARK, TemplateTraits, render
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
        inside = next((stop for stop in traits.stop_texts if stop in turn.content), None)
        if turn.role == "assistant" and inside is not None:
            raise RowProblem(
                f"an answer contains the stop token {inside!r}, where generation would end. "
                "Remove it from the row."
            )
    text = render(tokenizer, turns, options)
    ids = token_ids(tokenizer, text)
    labels = [IGNORE_INDEX] * len(ids)
    num_unlabeled = 0
    for index, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        prompt = render(tokenizer, turns[:index], options, generation_prompt=True)
        until = _end_of_answer(tokenizer, turns, index, options, traits, text, prompt)
        before, whole = (token_ids(tokenizer, part) for part in (prompt, text[: until or 0]))
        # Otherwise the model would be trained on tokens that it is never asked to produce.
        if until is not None and ids[: len(before)] == before and ids[: len(whole)] == whole:
            labels[len(before) : len(whole)] = whole[len(before) :]
        elif index < len(turns) - 1:
            num_unlabeled += 1
        else:
            raise RowProblem(
                f"the chat template continues the prompt {prompt[-40:]!r} in a way that "
                "does not hold exactly this answer, so its tokens cannot be told for certain. "
                "Let the template's generation prompt be exactly what stands in front of an answer "
                "(no space at its end that belongs to the answer's first token), or check "
                "ChatFormat.enable_thinking."
            )
    return Encoded(ids, labels, num_unlabeled_answers=num_unlabeled)


def _end_of_answer(
    tokenizer: "PreTrainedTokenizerBase",
    turns: Sequence[Message],
    index: int,
    options: Mapping[str, Any],
    traits: TemplateTraits,
    text: str,
    prompt: str,
) -> int | None:
    """Where the stop token of an answer ends in `text`; None where that cannot be told.

    A second rendering, with a word more at the end of this answer, shows where the answer ends.
    """
    longer = Message("assistant", turns[index].content + END_MARK)
    marked = render(tokenizer, [*turns[:index], longer, *turns[index + 1 :]], options)
    place = marked.find(END_MARK)
    if place < len(prompt) or marked.replace(END_MARK, "", 1) != text:
        return None
    if _squeezed(turns[index].content) not in _squeezed(text[len(prompt) : place]):
        return None
    stop = traits.control.search(text, place)
    if stop is None:
        return None
    between = text[place : stop.start()]
    # Behind an earlier answer, words may belong to whoever speaks next.
    is_last = index == len(turns) - 1
    return stop.end() if is_last or between in ("", traits.ending) or not between.strip() else None


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

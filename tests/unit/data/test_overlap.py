"""Equal prompts and rows are found, however they are written."""

import pytest

from patcher_pl.data.overlap import (
    BENIGN_PROMPTS,
    HARMFUL_PROMPTS,
    Known,
    asks_any,
    normalized,
    overlaps,
)
from patcher_pl.types import Conversation, Message


def row(*turns, origin="rows.jsonl:1"):
    roles = ("user", "assistant")
    messages = tuple(Message(roles[place % 2], text) for place, text in enumerate(turns))
    return Conversation(messages, harmful=True, origin=origin)


@pytest.mark.parametrize(
    "other",
    [
        "How do I brew TEA?",
        " how do I  brew\ntea ",
        "\N{LEFT DOUBLE QUOTATION MARK}How do I brew tea?!\N{RIGHT DOUBLE QUOTATION MARK}",
        "How do I brew \N{FULLWIDTH LATIN SMALL LETTER T}ea?",
    ],
)
def test_writing_does_not_matter(other):
    assert normalized(other) == normalized("How do I brew tea?")
    assert normalized(other) != normalized("How do I brew green tea?")


def test_text_without_words_is_itself():
    assert normalized(" ?! ") == "?!" != normalized("...")


def test_prompts_and_rows_are_counted_apart():
    first = Known.of([row("Tea?", "Stir."), row("Soup?", "Boil."), row("Soup?", "Salt.")])
    second = Known.of([row("tea", "STIR", origin="b:7"), row("soup", "No."), row("Cake?", "Bake.")])
    found = first.overlap("defender", second, "red team")
    assert (found.num_first, found.num_second) == (2, 3)
    assert (found.shared_prompts, found.shared_rows) == (2, 1)
    assert found.example == "rows.jsonl:1 and b:7"
    assert first.overlap("a", Known.of([row("Pie?")]), "b").example == ""


def test_every_turn_trains_but_only_the_last_one_is_asked():
    talk = row("Tea?", "Stir.", "And soup?", "Boil.")
    asked = Known.of([row("Hello.", "Hi.", "And soup?")], last_only=True)
    assert list(asked.prompts) == ["and soup"]
    assert asks_any(talk, asked.prompts)
    assert not asks_any(row("Hello.", "Hi."), asked.prompts)


def test_sets_of_prompts_are_not_held_against_each_other():
    known = {name: Known.of([row("Tea?")]) for name in ("data", HARMFUL_PROMPTS, BENIGN_PROMPTS)}
    pairs = [(entry.first, entry.second) for entry in overlaps(known)]
    assert pairs == [("data", HARMFUL_PROMPTS), ("data", BENIGN_PROMPTS)]

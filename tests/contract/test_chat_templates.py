"""If these fail, a model is trained on tokens that it never has to produce, or never learns to stop.

For every layout: what is trained is what generation would have to produce, and nothing else.
"""

import pytest

from patcher_pl.data.chat import ChatFormat
from patcher_pl.types import Conversation, Message
from tests.chat_templates import LAYOUTS, chatml, tokenizer_of

QUESTIONS = ("How do I brew a draught?", "And a sweet one?", "Thanks! No?")
# Short words that occur in control tokens and roles as well, and one with several lines.
ANSWERS = ("Yes.", "a", "Stir two petals\n\ninto warm water.")


def conversation(num_turns: int, answers=ANSWERS, system: str = "") -> Conversation:
    messages = [Message("system", system)] if system else []
    for question, answer in zip(QUESTIONS[:num_turns], answers, strict=False):
        messages += [Message("user", question), Message("assistant", answer)]
    return Conversation(tuple(messages), False, "rows.jsonl:1")


def runs(labels: list[int]) -> list[tuple[int, int]]:
    """First and last place of every unbroken stretch of labels."""
    counted = [index for index, label in enumerate(labels) if label != -100]
    starts = [index for index in counted if index - 1 not in counted]
    ends = [index + 1 for index in counted if index + 1 not in counted]
    return list(zip(starts, ends, strict=True))


@pytest.fixture(params=list(LAYOUTS))
def layout(request):
    return LAYOUTS[request.param]


@pytest.mark.parametrize("answers", [ANSWERS, ANSWERS[::-1], ("No.", "final", "assistant")])
@pytest.mark.parametrize("num_turns", [1, 2, 3])
def test_exactly_what_generation_has_to_produce_is_trained(layout, num_turns, answers):
    tokenizer, chat = tokenizer_of(layout), ChatFormat(**layout.options)
    encoded = chat.encode(tokenizer, conversation(num_turns, answers))
    assert encoded is not None
    texts = [tokenizer.decode(encoded.input_ids[start:end]) for start, end in runs(encoded.labels)]
    expected = []
    for answer in answers[: num_turns - 1]:
        if layout.earlier_stop is not None and not layout.lead.startswith("<think>"):
            expected.append((answer, layout.lead, layout.earlier_stop))
        elif layout.earlier_stop is not None:  # Shown without the thought, as if none were there.
            expected.append((answer, "", layout.earlier_stop))
    expected.append((answers[num_turns - 1], layout.lead, layout.stop))
    between = [
        text.removeprefix(lead).removesuffix(stop).removeprefix(answer)
        for text, (answer, lead, stop) in zip(texts, expected, strict=True)
    ]
    assert not "".join(between).strip()
    assert encoded.num_unlabeled_answers == num_turns - len(expected)


@pytest.mark.parametrize("num_turns", [1, 2, 3])
def test_the_generation_prompt_and_the_last_answer_are_the_trained_tokens(layout, num_turns):
    tokenizer, chat = tokenizer_of(layout), ChatFormat(**layout.options)
    row = conversation(num_turns)
    encoded = chat.encode(tokenizer, row)
    assert encoded is not None
    start, end = runs(encoded.labels)[-1]
    assert encoded.input_ids[:start] == chat.prompt_ids(tokenizer, row.prompt)
    assert encoded.input_ids[end - 1] == chat.stop_token_id(tokenizer)
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids[end - 1]) == layout.stop


def test_every_trained_answer_ends_where_generation_stops(layout):
    """The stop token is trained once per answer, and generation knows all of them."""
    tokenizer, chat = tokenizer_of(layout), ChatFormat(**layout.options)
    encoded = chat.encode(tokenizer, conversation(3))
    assert encoded is not None
    stops = chat.stop_token_ids(tokenizer)
    for start, end in runs(encoded.labels):
        answer = encoded.input_ids[start:end]
        assert answer[-1] in stops
        assert not set(answer[:-1]) & set(stops)


def test_no_word_of_the_user_is_trained(layout):
    tokenizer, chat = tokenizer_of(layout), ChatFormat(**layout.options)
    system = "You are a careful potion master."
    encoded = chat.encode(tokenizer, conversation(3, system=system))
    assert encoded is not None
    trained = "".join(
        tokenizer.decode(encoded.input_ids[start:end]) for start, end in runs(encoded.labels)
    )
    assert not any(words in trained for words in (*QUESTIONS, system))
    assert system in tokenizer.decode(encoded.input_ids)


@pytest.mark.parametrize("marked", [False, True])
def test_a_generation_prompt_that_ends_with_a_space_of_the_answer_is_refused(marked):
    """The space is part of the answer's first token; generation would never produce that token."""
    from patcher_pl.errors import DataError

    layout = LAYOUTS["eos at the end only"]
    tokenizer = tokenizer_of(layout)
    answer = "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n' }}"
        "{% else %}{{ 'Bot: ' }}"
        + (answer if marked else "{{ m['content'] + eos_token }}")
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Bot: ' }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*no space at its end"):
        ChatFormat().encode(tokenizer, conversation(1, ("two petals",)))


def test_a_missing_template_is_said_once(caplog):
    tokenizer = tokenizer_of(LAYOUTS["no template"])
    tokenizer.name_or_path = "nobody else's"  # What is said once is said once per process.
    for _ in range(2):
        ChatFormat().encode(tokenizer, conversation(1))
    said = [record for record in caplog.records if "no chat template" in record.message]
    assert len(said) == 1


def test_layouts_are_told_apart():
    """The helper that writes templates must not write the same one twice."""
    assert chatml() != chatml("{}\n")
    assert len({repr(layout) for layout in LAYOUTS.values()}) == len(LAYOUTS) > 15

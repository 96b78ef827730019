"""If these fail, models train on prompt tokens, miss parts of answers, or never learn to stop."""

import pytest

from patcher_pl.data.chat import ChatFormat, Encoded
from patcher_pl.errors import ConfigError, DataError
from patcher_pl.types import Conversation, Message
from tests.families import FAMILIES, LLAMA_TEMPLATE, QWEN2_TEMPLATE, build_tokenizer

QUESTION, ANSWER = "How do I brew a bitter moonroot draught?", "Stir two petals\ninto warm water."
FOLLOW_UP, SECOND = "Thanks! And a sweet one?", "Add honey \u2014 two spoons."
SINGLE = Conversation((Message("user", QUESTION), Message("assistant", ANSWER)), False, "p.jsonl:7")
DOUBLE = Conversation(
    (*SINGLE.messages, Message("user", FOLLOW_UP), Message("assistant", SECOND)), False, "p.jsonl:8"
)
# Where the template, or our own default one, puts a space in front of answers.
SPACED = {"mistral", "gpt2"}

MARKED_TEMPLATE = LLAMA_TEMPLATE.replace(
    "{{- message['content'] | trim + '<|eot_id|>' }}",
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{%- else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}",
)


def encode(tokenizer, conversation, **options) -> Encoded:
    encoded = ChatFormat(**options).encode(tokenizer, conversation)
    assert encoded is not None
    assert len(encoded.labels) == len(encoded.input_ids)
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (-100, token)
    return encoded


def answers(tokenizer, encoded: Encoded) -> list[str]:
    """The text of each unbroken stretch of labels."""
    stretches: list[list[int]] = [[]]
    for label in encoded.labels:
        if label != -100:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


def shown(family: str, answer: str) -> str:
    return (" " if family in SPACED else "") + answer + FAMILIES[family].stop


@pytest.mark.parametrize("system_prompt", [None, "You are a careful potion master."])
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_exactly_the_answer_and_its_stop_token(family, system_prompt):
    tokenizer = build_tokenizer(family)
    encoded = encode(tokenizer, SINGLE, system_prompt=system_prompt)
    assert answers(tokenizer, encoded) == [shown(family, ANSWER)]
    text = tokenizer.decode(encoded.input_ids)
    assert QUESTION in text
    assert (system_prompt or "") in text


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"qwen3"}))
def test_every_answer_of_a_longer_conversation_is_labeled(family):
    tokenizer = build_tokenizer(family)
    encoded = encode(tokenizer, DOUBLE, system_prompt="You are a careful potion master.")
    assert answers(tokenizer, encoded) == [shown(family, ANSWER), shown(family, SECOND)]
    assert encoded.num_unlabeled_answers == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_unlabeled_tokens_before_the_last_answer_are_what_generation_is_given(family):
    tokenizer = build_tokenizer(family)
    chat = ChatFormat(system_prompt="You are a careful potion master.")
    for conversation in (SINGLE, DOUBLE):
        encoded = encode(tokenizer, conversation, system_prompt=chat.system_prompt)
        prompt = chat.prompt_ids(tokenizer, conversation.prompt)
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.labels[len(prompt)] == encoded.input_ids[len(prompt)]
        assert encoded.labels[len(prompt) - 1] == -100


def test_qwen3_leaves_earlier_answers_unlabeled_because_it_shows_them_without_thought():
    tokenizer = build_tokenizer("qwen3")
    encoded = encode(tokenizer, DOUBLE)
    assert answers(tokenizer, encoded) == [SECOND + "<|im_end|>"]
    assert encoded.num_unlabeled_answers == 1


def test_qwen3_thinking_switch_decides_whether_the_thought_is_trained():
    tokenizer = build_tokenizer("qwen3")
    thoughtful = Conversation(
        (
            Message("user", QUESTION),
            Message("assistant", f"<think>\nPetals?\n</think>\n\n{ANSWER}"),
        ),
        False,
        "p.jsonl:9",
    )
    encoded = encode(tokenizer, thoughtful, enable_thinking=True)
    assert answers(tokenizer, encoded) == [f"<think>\nPetals?\n</think>\n\n{ANSWER}<|im_end|>"]
    # With thinking off the prompt already holds an empty thought, which this answer contradicts.
    with pytest.raises(DataError, match=r"p\.jsonl:9: .*ChatFormat\.enable_thinking"):
        encode(tokenizer, thoughtful, enable_thinking=False)


@pytest.mark.parametrize("conversation", [SINGLE, DOUBLE])
def test_generation_marks_agree_with_prefix_comparison(conversation):
    plain, marked = build_tokenizer("llama"), build_tokenizer("llama")
    marked.chat_template = MARKED_TEMPLATE
    assert encode(marked, conversation) == encode(plain, conversation)


@pytest.mark.parametrize("block", ["answer only", "answer, stop and line break"])
def test_the_stop_token_is_trained_whatever_is_marked(block):
    tokenizer = build_tokenizer("qwen2")
    whole = "message['content'] + '<|im_end|>\\n'"
    inside, outside = (
        ("message['content']", "'<|im_end|>\\n'") if block == "answer only" else (whole, "''")
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{%- if message['role'] == 'assistant' %}"
        f"{{% generation %}}{{{{ {inside} }}}}{{% endgeneration %}}{{{{ {outside} }}}}"
        f"{{%- else %}}{{{{ {whole} }}}}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    encoded = encode(tokenizer, DOUBLE)
    assert answers(tokenizer, encoded) == [ANSWER + "<|im_end|>", SECOND + "<|im_end|>"]


def test_marks_that_miss_an_answer_change_nothing():
    """What a model has to produce follows from the generation prompt, not from marks."""
    tokenizer = build_tokenizer("llama")
    tokenizer.chat_template = MARKED_TEMPLATE.replace(
        "message['role'] == 'assistant' %}{% gen", "loop.last %}{% gen"
    )
    expected = [ANSWER + "<|eot_id|>", SECOND + "<|eot_id|>"]
    assert answers(tokenizer, encode(tokenizer, DOUBLE)) == expected


def test_a_template_that_changes_the_prompt_afterwards_is_refused_not_guessed():
    tokenizer = build_tokenizer("qwen2")
    tokenizer.chat_template = QWEN2_TEMPLATE + "{% if add_generation_prompt %}Answer: {% endif %}"
    with pytest.raises(DataError, match=r"p\.jsonl:7: .*cannot be told for certain"):
        encode(tokenizer, SINGLE)


def test_a_template_that_changes_the_answer_is_refused():
    tokenizer = build_tokenizer("qwen2")
    tokenizer.chat_template = QWEN2_TEMPLATE.replace(
        "message['content'] +", "message['content'].split('petals')[0] +"
    )
    with pytest.raises(DataError, match=r"p\.jsonl:7: .*cannot be told for certain"):
        encode(tokenizer, SINGLE)


def test_a_token_that_spans_prompt_and_answer_is_refused():
    tokenizer = build_tokenizer("gpt2")
    # The prompt ends inside what becomes one token once the answer follows.
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ 'Sti' + message['content'] + eos_token }}{% else %}{{ message['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}Sti{% endif %}"
    )
    assert tokenizer.tokenize("Sti") != tokenizer.tokenize("Stir")[:1]
    split = Conversation((Message("user", "?"), Message("assistant", "r it")), False, "p.jsonl:3")
    with pytest.raises(DataError, match="cannot be told for certain"):
        encode(tokenizer, split)


def test_an_answer_with_the_stop_token_inside_is_refused():
    messages = (Message("user", QUESTION), Message("assistant", "Stir.<|im_end|> More."))
    with pytest.raises(DataError, match=r"p\.jsonl:4: .*stop token '<\|im_end\|>'"):
        encode(build_tokenizer("qwen2"), Conversation(messages, False, "p.jsonl:4"))


def test_a_template_without_stop_token_is_refused():
    tokenizer = build_tokenizer("qwen2")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    with pytest.raises(ConfigError, match="never stop"):
        encode(tokenizer, SINGLE)

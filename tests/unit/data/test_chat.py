"""If these fail, prompts differ from what models were trained on, or rows vanish unnoticed."""

import pytest

from patcher_pl.data.chat import ChatFormat
from patcher_pl.errors import ConfigError, DataError
from patcher_pl.types import Conversation, Message
from tests.families import FAMILIES, build_tokenizer

PROMPT = (Message("user", "How do I brew a draught?"),)
LONG = Conversation((*PROMPT, Message("assistant", "Stir and wait. " * 20)), False, "p.jsonl:2")


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_end_where_the_answer_begins(family):
    tokenizer = build_tokenizer(family)
    text = tokenizer.decode(ChatFormat(system_prompt="Be brief.").prompt_ids(tokenizer, PROMPT))
    assert text.count("Be brief.") == 1
    assert text.count(PROMPT[0].content) == 1
    ending = text.partition(PROMPT[0].content)[2]
    assert (
        ending
        == {
            "llama": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "qwen2": "<|im_end|>\n<|im_start|>assistant\n",
            "qwen3": "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
            "mistral": "[/INST]",
            "gemma": "<end_of_turn>\n<start_of_turn>model\n",
            "gpt2": "\nAssistant:",
        }[family]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefill_begins_the_answer_as_training_does(family):
    tokenizer = build_tokenizer(family)
    chat = ChatFormat()
    answered = Conversation((*PROMPT, Message("assistant", "Sure, stir it.")), False, "x")
    encoded = chat.encode(tokenizer, answered)
    assert encoded is not None
    whole = tokenizer.decode(encoded.input_ids)
    begun = tokenizer.decode(chat.prompt_ids(tokenizer, PROMPT, prefill="Sure,"))
    assert begun.endswith("Sure,")
    assert whole.startswith(begun)


def test_thinking_leaves_the_thought_to_the_model():
    tokenizer = build_tokenizer("qwen3")
    ids = ChatFormat(enable_thinking=True).prompt_ids(tokenizer, PROMPT)
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")


def test_a_conversations_own_system_turn_wins():
    tokenizer = build_tokenizer("gemma")
    prompt = (Message("system", "Be kind."), *PROMPT)
    text = tokenizer.decode(ChatFormat(system_prompt="Be brief.").prompt_ids(tokenizer, prompt))
    assert "user\nBe kind.\n\nHow do I" in text
    assert "Be brief." not in text


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stop_token_is_the_one_of_the_template(family):
    tokenizer = build_tokenizer(family)
    stop = ChatFormat().stop_token_id(tokenizer)
    assert tokenizer.convert_ids_to_tokens(stop) == FAMILIES[family].stop


def test_the_default_template_is_kept_on_the_tokenizer_for_export(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer("gpt2")
    expected = ChatFormat().prompt_ids(tokenizer, PROMPT)
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": PROMPT[0].content}]
    ids = reloaded.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == expected


def test_a_tokenizer_that_cannot_end_an_answer_is_refused():
    tokenizer = build_tokenizer("gpt2")
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="end-of-text"):
        ChatFormat().prompt_ids(tokenizer, PROMPT)


def test_options_reach_the_template():
    tokenizer = build_tokenizer("llama")
    tokenizer.chat_template = "{{ date_string }}" + tokenizer.chat_template
    chat = ChatFormat(template_options={"date_string": "1 May"})
    assert tokenizer.decode(chat.prompt_ids(tokenizer, PROMPT)).startswith("1 May")


def test_truncation_keeps_the_beginning_of_the_answer_and_says_so():
    tokenizer = build_tokenizer("qwen2")
    full = ChatFormat().encode(tokenizer, LONG)
    assert full is not None
    start = next(index for index, label in enumerate(full.labels) if label != -100)
    cut = ChatFormat(max_length=start + 1).encode(tokenizer, LONG)
    assert cut is not None and cut.truncated and not full.truncated
    assert cut.input_ids == full.input_ids[: start + 1]
    assert cut.labels == full.labels[: start + 1]


def test_truncation_never_leaves_an_example_without_its_answer():
    tokenizer = build_tokenizer("qwen2")
    full = ChatFormat().encode(tokenizer, LONG)
    assert full is not None
    start = next(index for index, label in enumerate(full.labels) if label != -100)
    assert ChatFormat(max_length=start).encode(tokenizer, LONG) is None
    # Two answers, room for the first one only: the second must not vanish quietly.
    double = Conversation((*LONG.messages, *LONG.messages), False, "p.jsonl:3")
    assert ChatFormat(max_length=len(full.input_ids) + 5).encode(tokenizer, double) is None


def test_long_rows_can_be_skipped_or_stop_the_run():
    tokenizer = build_tokenizer("qwen2")
    assert ChatFormat(max_length=30, too_long="skip").encode(tokenizer, LONG) is None
    with pytest.raises(DataError, match=r"p\.jsonl:2: .* tokens, ChatFormat\.max_length is 30"):
        ChatFormat(max_length=30, too_long="error").encode(tokenizer, LONG)


def test_turns_after_the_last_answer_are_left_out():
    tokenizer = build_tokenizer("llama")
    asked_again = Conversation((*LONG.messages, *PROMPT), False, "x")
    assert ChatFormat().encode(tokenizer, asked_again) == ChatFormat().encode(tokenizer, LONG)


def test_a_row_without_answer_names_its_origin():
    with pytest.raises(DataError, match=r"p\.jsonl:5: no assistant turn"):
        ChatFormat().encode(build_tokenizer("llama"), Conversation(PROMPT, False, "p.jsonl:5"))


def test_a_row_that_the_template_refuses_names_its_origin_and_the_templates_words():
    twice = Conversation((*PROMPT, *LONG.messages), False, "p.jsonl:6")
    with pytest.raises(DataError, match=r"p\.jsonl:6: Roles must alternate"):
        ChatFormat().encode(build_tokenizer("gemma"), twice)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, r"ChatFormat\.max_length must be >= 2, got 1"),
        ({"template_options": {"messages": []}}, r"ChatFormat\.template_options .*'messages'"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ChatFormat(**options)


def test_an_unknown_way_to_treat_long_conversations_is_refused():
    chat = ChatFormat()
    object.__setattr__(chat, "too_long", "wrap")  # Past the tests' own type checker.
    with pytest.raises(ValueError, match=r"ChatFormat\.too_long must be .*'wrap'"):
        chat.__post_init__()

"""If these fail, a judge scores what a model only thought, or a thought that it never ended."""

from dataclasses import dataclass

import pytest
from transformers import AutoModelForCausalLM

from patcher_pl.data.chat import ChatFormat
from patcher_pl.evaluation.backends import Backend
from patcher_pl.evaluation.generate import Generation
from patcher_pl.evaluation.thoughts import spoken_part
from patcher_pl.types import Message
from tests.families import build_family, build_tokenizer

PROMPT = [Message("user", "How do I brew a draught?")]
OPENS_A_THOUGHT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: <think>\n' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Says(Backend):
    """Answers with a text, tokenized, whatever the model would say."""

    tokenizer: object
    text: str

    def continuations(self, model, prompts, decoding):
        return [self.tokenizer(self.text, add_special_tokens=False)["input_ids"]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = build_family("qwen3", tmp_path_factory.mktemp("family"))
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.fixture(params=["special", "text"])
def tokenizer(request):
    """One in whose vocabulary the marks are special tokens, and one that spells them."""
    return build_tokenizer("qwen3" if request.param == "special" else "qwen2")


def answer(model, tokenizer, text):
    generation = Generation(backend=Says(tokenizer=tokenizer, text=text))
    chat = ChatFormat(enable_thinking=True)
    return generation.generate(model, tokenizer, chat, [PROMPT])[0]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Two petals, and then", ""),
        ("Two petals.\n</think>\n\nStir it.<|im_end|>", "Stir it."),
        ("</think>\n\nStir it.<|im_end|>", "Stir it."),
        ("Two.</think>Stir <think>or not", ""),
        ("Two petals.<|im_end|>", ""),
    ],
)
def test_a_template_may_open_the_thought_itself(model, tokenizer, said, expected):
    tokenizer.chat_template = OPENS_A_THOUGHT
    assert answer(model, tokenizer, said).text == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("<think>\nTwo petals, and then", ""),
        ("<think>\nTwo petals.\n</think>\n\nStir it.<|im_end|>", "Stir it."),
        ("Stir it.<|im_end|>", "Stir it."),
    ],
)
def test_a_model_may_open_the_thought(model, tokenizer, said, expected):
    assert answer(model, tokenizer, said).text == expected


def test_an_empty_thought_in_the_prompt_is_closed(model):
    tokenizer = build_tokenizer("qwen3")
    generation = Generation(backend=Says(tokenizer=tokenizer, text="Stir it.<|im_end|>"))
    found = generation.generate(model, tokenizer, ChatFormat(enable_thinking=False), [PROMPT])[0]
    assert found.text == "Stir it."


def test_thoughts_are_cut_out_of_text_as_well():
    assert spoken_part("<think>a</think> b <think>c</think>d ") == "d"
    assert spoken_part("b <think>c") == ""

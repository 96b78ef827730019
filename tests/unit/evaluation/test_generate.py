"""Answers must be those of plain greedy decoding, and asking must leave no trace."""

import copy
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from patcher_pl.data.chat import ChatFormat
from patcher_pl.errors import DataError
from patcher_pl.evaluation import Generation
from patcher_pl.evaluation.backends.hugging_face import left_padded
from patcher_pl.evaluation.generate import stop_token_ids
from patcher_pl.types import Message
from tests.families import FAMILIES, build_family

GREEDY = Generation(max_new_tokens=6, batch_size=3)
PROMPTS = [
    [Message("user", "How do I brew a bitter moonroot draught?")],
    [Message("user", "What goes into a plain pancake?")],
    [Message("user", "Thanks!")],
    [
        Message("user", "What goes into a plain pancake?"),
        Message("assistant", "Flour, milk and an egg."),
        Message("user", "Thanks! And a sweet one?"),
    ],
]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request, tmp_path_factory):
    return _load(build_family(request.param, tmp_path_factory.mktemp("family") / request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return _load(build_family("llama", tmp_path_factory.mktemp("family") / "llama"))


def _load(directory: Path):
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        # Initial weights are so small that answers would ignore the prompt.
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(30)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _greedy_by_hand(model, tokenizer, chat, prompt, steps):
    """The definition: most likely token after the whole sequence, one sequence at a time."""
    ids = chat.prompt_ids(tokenizer, prompt)
    new = []
    stops = stop_token_ids(model, tokenizer, chat)
    with torch.no_grad():
        while len(new) < steps:
            token = int(model(torch.tensor([[*ids, *new]])).logits[0, -1].argmax())
            if token in stops:
                break
            new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def test_batched_answers_are_those_of_one_by_one_greedy_decoding(family):
    """Wrong if padding, positions, or the order of answers were off in a mixed batch."""
    model, tokenizer = family
    answers = GREEDY.generate(model, tokenizer, ChatFormat(), PROMPTS)
    by_hand = [_greedy_by_hand(model, tokenizer, ChatFormat(), prompt, 6) for prompt in PROMPTS]
    assert [answer.text for answer in answers] == by_hand
    assert len(set(by_hand)) > 1, "the test needs prompts that are answered differently"


def test_no_prompts_give_no_answers(llama):
    assert GREEDY.generate(*llama, ChatFormat(), []) == []


def _always_says(model, tokenizer, token_ids):
    """Makes the model say `token_ids` in turn: every position looks up its token's successor."""
    successors = dict(zip(token_ids, [*token_ids[1:], token_ids[-1]], strict=True))

    def hook(module, arguments, keywords, output):
        last = keywords["input_ids"]
        output.logits = torch.zeros_like(output.logits)
        for row in range(last.shape[0]):
            token = successors.get(int(last[row, -1]), token_ids[0])
            output.logits[row, -1, token] = 50.0
        return output

    return model.register_forward_hook(hook, with_kwargs=True)


def test_generation_stops_at_the_template_stop_token(family):
    """Wrong if a model that ends its turn properly were made to talk on (Gemma: no eos)."""
    model, tokenizer = family
    chat = ChatFormat()
    words = tokenizer("Stir two petals", add_special_tokens=False)["input_ids"]
    words = list(dict.fromkeys(words))
    handle = _always_says(model, tokenizer, [*words, chat.stop_token_id(tokenizer)])
    generation = replace(GREEDY, max_new_tokens=len(words) + 5)
    own = model.generation_config
    model.generation_config = GenerationConfig()  # As in a directory without that file.
    try:
        stopped = generation.generate(model, tokenizer, chat, PROMPTS[:3])
        cut = replace(generation, max_new_tokens=2).generate(model, tokenizer, chat, PROMPTS[:1])
    finally:
        handle.remove()
        model.generation_config = own
    said = str(tokenizer.decode(words)).strip()
    assert [(answer.text, answer.finished) for answer in stopped] == [(said, True)] * 3
    assert stopped[0].num_tokens == len(words) + 1
    assert not cut[0].finished
    assert cut[0].num_tokens == 2


def test_checkpoint_stop_tokens_count_too(llama):
    model, tokenizer = llama
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=[7, 9])
    try:
        stops = stop_token_ids(model, tokenizer, ChatFormat())
    finally:
        model.generation_config = own
    assert {7, 9, tokenizer.eos_token_id} <= set(stops)


def test_checkpoint_settings_neither_change_greedy_answers_nor_warn(llama, caplog, recwarn):
    """Wrong if two defenses were compared with two ways of decoding."""
    model, tokenizer = llama
    expected = GREEDY.generate(model, tokenizer, ChatFormat(), PROMPTS)
    own = model.generation_config
    theirs = GenerationConfig(
        do_sample=True,
        temperature=3.0,
        top_k=20,
        top_p=0.8,
        repetition_penalty=9.0,
        min_new_tokens=5,
        max_length=3,
        eos_token_id=own.eos_token_id,
    )
    model.generation_config = theirs
    transformers_log = logging.getLogger("transformers")
    transformers_log.addHandler(caplog.handler)
    try:
        answers = GREEDY.generate(model, tokenizer, ChatFormat(), PROMPTS)
        assert model.generation_config is theirs
    finally:
        model.generation_config = own
        transformers_log.removeHandler(caplog.handler)
    assert answers == expected
    assert not caplog.records
    assert not recwarn.list


def test_asking_leaves_no_trace(llama):
    """Wrong if a probe in the middle of training changed what training does next."""
    model, tokenizer = llama
    model.train()
    model.model.layers[0].eval()
    side, modes = tokenizer.padding_side, [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    generators = torch.get_rng_state()
    sampling = replace(GREEDY, temperature=1.0)
    try:
        sampling.generate(model, tokenizer, ChatFormat(), PROMPTS)
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), generators)
        assert tokenizer.padding_side == side
        for name, value in model.state_dict().items():
            assert torch.equal(value, weights[name]), name
        assert all(parameter.grad is None for parameter in model.parameters())
    finally:
        model.eval()


def test_state_is_restored_when_generation_fails(llama):
    model, tokenizer = llama
    own, generators = model.generation_config, torch.get_rng_state()

    def fail(module, arguments):
        raise RuntimeError("out of memory")

    handle = model.model.register_forward_pre_hook(fail)
    model.train()
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            GREEDY.generate(model, tokenizer, ChatFormat(), PROMPTS)
        assert model.training
        assert model.generation_config is own
        assert torch.equal(torch.get_rng_state(), generators)
    finally:
        handle.remove()
        model.eval()


def test_sampling_follows_the_seed(llama):
    def texts(seed, temperature=1.0):
        sampling = replace(GREEDY, temperature=temperature, seed=seed)
        answers = sampling.generate(*llama, ChatFormat(), PROMPTS)
        return [answer.text for answer in answers]

    assert texts(0) == texts(0)
    assert texts(0) != texts(1)
    assert texts(0, temperature=0.0) == texts(1, temperature=0.0)


def test_prefill_begins_the_answer_and_is_continued(family):
    """Wrong if the judge were shown half an answer, or words glued to the prefill."""
    model, tokenizer = family
    chat, prefill = ChatFormat(), "Stir two"
    tokens = list(dict.fromkeys(tokenizer(" petals", add_special_tokens=False)["input_ids"]))
    handle = _always_says(model, tokenizer, [*tokens, chat.stop_token_id(tokenizer)])
    try:
        answer = GREEDY.generate(model, tokenizer, chat, PROMPTS[:1], prefill)[0]
    finally:
        handle.remove()
    continuation = str(tokenizer.decode(tokens)).strip()
    assert answer.text.startswith(prefill)
    assert answer.text.split()[2:] == continuation.split()


def test_a_prefill_that_is_not_continued_is_no_answer(family):
    """Wrong if what the attacker wrote passed for what the model said: it would seem to comply."""
    model, tokenizer = family
    chat = ChatFormat()
    handle = _always_says(model, tokenizer, [chat.stop_token_id(tokenizer)])
    try:
        answers = GREEDY.generate(model, tokenizer, chat, PROMPTS[:2], "Sure, here is")
    finally:
        handle.remove()
    assert [(answer.text, answer.finished) for answer in answers] == [("", True)] * 2


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft 0.21
def test_answers_with_adapters_come_from_the_adapted_model(llama):
    """Wrong if the adapter were ignored, or its wrapper left changed settings behind."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = llama
    plain = GREEDY.generate(model, tokenizer, ChatFormat(), PROMPTS)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], task_type="CAUSAL_LM")
    adapted = get_peft_model(copy.deepcopy(model), config)
    same = GREEDY.generate(adapted, tokenizer, ChatFormat(), PROMPTS)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    other = GREEDY.generate(adapted, tokenizer, ChatFormat(), PROMPTS)
    merged = GREEDY.generate(adapted.merge_and_unload(), tokenizer, ChatFormat(), PROMPTS)
    assert same == plain
    assert other != plain
    assert other == merged


def test_answer_ends_where_the_context_does(llama):
    """Wrong if a long prompt crashed the run, or ran past the positions the model knows."""
    model, tokenizer = llama
    room = model.config.max_position_embeddings
    overhead = len(ChatFormat().prompt_ids(tokenizer, [Message("user", "a")])) - 1
    nearly_full = [Message("user", "a" + " a" * (room - overhead - 4))]
    length = len(ChatFormat().prompt_ids(tokenizer, nearly_full))
    assert room - 6 < length < room, "the test needs a prompt that nearly fills the context"
    handle = _always_says(model, tokenizer, [20])
    try:
        answer = GREEDY.generate(model, tokenizer, ChatFormat(), [nearly_full])[0]
    finally:
        handle.remove()
    assert answer.num_tokens == min(6, room - length)
    with pytest.raises(DataError, match="leaves no room"):
        GREEDY.generate(model, tokenizer, ChatFormat(), [[Message("user", "a " * room)]])


def test_left_padding_by_hand():
    input_ids, mask = left_padded([[5], [6, 7, 8]], pad_id=1)
    assert input_ids.tolist() == [[1, 1, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("batch_size", 0),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
    ],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"Generation.{field} must be .*got {value}"):
        Generation(**{field: value})

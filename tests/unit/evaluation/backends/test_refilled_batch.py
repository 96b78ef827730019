"""A batch that loses and gains rows must answer as if every prompt were asked alone."""

import copy
from collections import Counter

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from patcher_pl.evaluation.backends import Decoding, HuggingFace
from patcher_pl.evaluation.backends.hugging_face import continued_by_generate
from patcher_pl.evaluation.backends.refillable import can_refill
from patcher_pl.evaluation.backends.refilled_batch import continued, shared_start
from patcher_pl.evaluation.backends.slot_cache import SlotCache
from patcher_pl.models import packed_attention
from patcher_pl.randomness import seeded
from tests.families import FAMILIES, build_family

STOPS = list(range(3, 40))
CPU = torch.device("cpu")


def lively(model):
    """Initial weights are so small that answers would ignore the prompt."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(30)
    return model.eval()


@pytest.fixture(scope="module")
def model(llama):
    return lively(AutoModelForCausalLM.from_pretrained(llama))


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, 250, (length,), generator=generator).tolist()
        for length in (5, 9, 2, 14, 7, 3, 11, 1, 6, 6)
    ]


def decoding(**changed):
    settings = {
        **{"max_new_tokens": 12, "batch_size": 3, "temperature": 0.0, "top_p": 1.0, "top_k": 0},
        **{"repetition_penalty": 1.0, "seed": 0, "stop_ids": STOPS, "pad_id": 0, "context": None},
    }
    return Decoding(**(settings | changed))


def one_by_one(model, prompt, *, stops=STOPS, steps=12, penalty=1.0):
    """The definition: the most likely token after the whole text, without cache and padding."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + steps:
            logits = model(torch.tensor([ids])).logits[0, -1]
            seen = torch.tensor(sorted(set(ids)))
            before = logits[seen]
            logits[seen] = torch.where(before > 0, before / penalty, before * penalty)
            ids.append(int(logits.argmax()))
            if ids[-1] in stops:
                break
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 64])
def test_greedy_answers_do_not_depend_on_the_batch(model, prompts, batch_size):
    """Wrong if a row read its neighbor's past, or that of the answer whose place it took."""
    expected = [one_by_one(model, prompt) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 3, "the test needs mixed stop times"
    assert continued(model, prompts, decoding(batch_size=batch_size)) == expected


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3]], [1, 2]),
        ([[1, 2, 3], [1, 2, 3]], [1, 2]),
        ([[1, 2], [1, 2, 3]], [1]),
        ([[1], [1, 2]], []),
        ([[1, 2], [2, 2]], []),
        ([[1, 2, 3]], []),
    ],
)
def test_what_all_prompts_start_with(prompts, shared):
    assert shared_start(prompts) == shared


def test_what_all_prompts_start_with_is_read_once(model, prompts):
    """Wrong if it were read with every prompt, or answers or penalties came to depend on it."""
    asked = [[41, 7, 99, 41, 12, *prompt] for prompt in prompts]
    settings = {"steps": 12, "penalty": 3.0}
    expected = [one_by_one(model, prompt, **settings) for prompt in asked]
    tokens = []
    handle = model.register_forward_hook(
        lambda *given: tokens.append(given[2]["input_ids"].shape), with_kwargs=True
    )
    try:
        assert continued(model, asked, decoding(repetition_penalty=3.0)) == expected
    finally:
        handle.remove()
    assert next(shape for shape in tokens if shape[1] > 1) == (1, 5)
    assert all(width <= max(map(len, prompts)) for _, width in tokens)


@pytest.mark.parametrize("start", [[], [41, 7, 99]], ids=["alone", "shared_start"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("attention", ["sdpa", "packed_sdpa", "eager"])
def test_answers_are_those_of_generate(name, attention, start, prompts, tmp_path):
    """Wrong if faster answers were other answers, in a supported family."""
    prompts = [start + prompt for prompt in prompts]
    directory = build_family(name, tmp_path / name)
    packed_attention.register()
    model = lively(AutoModelForCausalLM.from_pretrained(directory, attn_implementation=attention))
    assert can_refill(model)
    plain = continued_by_generate(model, prompts, decoding())
    ended = [_until_stop(answer) for answer in plain]
    assert HuggingFace().continuations(model, prompts, decoding()) == ended


def _until_stop(answer):
    end = next((place for place, token in enumerate(answer) if token in STOPS), len(answer))
    return answer[: end + 1]


def test_penalties_count_what_the_row_itself_said(model, prompts):
    """Wrong if a row were penalized for padding, or for what its place said before."""
    generator = torch.Generator().manual_seed(0)
    # As long as one another: what an earlier row left lies where a new one will be read.
    asked = [*prompts, *torch.randint(0, 250, (16, 4), generator=generator).tolist()]
    settings = {"stops": STOPS[:12], "steps": 24, "penalty": 3.0}
    expected = [one_by_one(model, prompt, **settings) for prompt in asked]
    unpenalized = [one_by_one(model, prompt, **settings | {"penalty": 1.0}) for prompt in asked]
    assert expected != unpenalized
    # The worst case for padding: its token is what answers want.
    wanted = Counter(token for answer in expected for token in set(answer)).most_common(1)[0][0]
    options = {"stop_ids": STOPS[:12], "max_new_tokens": 24, "pad_id": wanted, "batch_size": 3}
    assert continued(model, asked, decoding(repetition_penalty=3.0, **options)) == expected


def test_no_row_is_computed_for_nothing(model, prompts):
    """Wrong if finished answers stayed in the batch: each forward row must yield one token."""
    rows = []
    handle = model.register_forward_hook(
        lambda *given: rows.append(given[2]["input_ids"].shape), with_kwargs=True
    )
    try:
        answers = continued(model, prompts, decoding(batch_size=4))
    finally:
        handle.remove()
    assert sum(number for number, _ in rows) == sum(map(len, answers))
    assert max(number for number, _ in rows) <= 4
    read = [number for number, width in rows if width > 1]
    assert len(read) > 2, "waiting prompts are read while others are answered"
    alone = continued(model, prompts[:1], decoding(stop_ids=[], max_new_tokens=40))
    assert len(alone[0]) == 40


def test_every_answer_ends_at_the_context(model):
    """Wrong if the longest prompt of a batch took the room of the others."""
    prompts = [[50] * 10, [60] * 4, [70] * 15]
    answers = continued(model, prompts, decoding(context=16, stop_ids=[], max_new_tokens=9))
    assert [len(answer) for answer in answers] == [6, 9, 1]


def test_stop_tokens_are_part_of_the_answer_and_nothing_follows(model, prompts):
    answers = continued(model, prompts, decoding())
    assert any(answer[-1] in STOPS for answer in answers)
    assert not any(set(answer[:-1]) & set(STOPS) for answer in answers)
    assert any(len(answer) == 1 for answer in continued(model, prompts, decoding(max_new_tokens=1)))


@pytest.mark.parametrize(
    "rules",
    [
        {"temperature": 1.0},
        {"temperature": 3.0, "top_k": 7, "top_p": 0.8},
        {"temperature": 0.6, "repetition_penalty": 1.4, "top_p": 0.9},
    ],
)
def test_a_sampler_draws_as_generate_does(model, prompts, rules):
    """Wrong if a rule were left out, or came at another place: the same noise gives the same draw."""
    sampling = decoding(batch_size=len(prompts), stop_ids=[], **rules)
    with seeded(3, CPU):
        found = continued(model, prompts, sampling)
    with seeded(3, CPU):
        expected = continued_by_generate(model, prompts, sampling)
    assert found == expected


def test_sampling_with_refills_follows_the_seed(model, prompts):
    def drawn(seed):
        with seeded(seed, CPU):
            return continued(model, prompts, decoding(temperature=2.0))

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft 0.21
def test_adapters_are_refilled_too(model, prompts):
    """Wrong if attacks with LoRA were judged the slow way, or without their adapters."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    assert can_refill(adapted.get_base_model())
    expected = [one_by_one(adapted, prompt) for prompt in prompts]
    assert expected != [one_by_one(model, prompt) for prompt in prompts]
    assert HuggingFace().continuations(adapted, prompts, decoding()) == expected


SIZES = {
    **{"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0},
}
NOT_REFILLED = {
    "sliding window": ("MistralConfig", {"sliding_window": 4}),
    "sliding window in every other layer": ("Gemma2Config", {"head_dim": 16}),
    "state space": ("MambaConfig", {"state_size": 4}),
    "attention biased by distance": ("FalconConfig", {"alibi": True}),
    "no positions": ("BloomConfig", {"n_head": 2}),
}


@pytest.mark.parametrize("kind", NOT_REFILLED)
def test_what_cannot_be_refilled_answers_through_generate(kind, prompts, monkeypatch):
    """Wrong if an architecture whose memory is of another kind got wrong answers, or none."""
    name, options = NOT_REFILLED[kind]
    config = getattr(transformers, name)(**(SIZES | options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    assert not can_refill(model)
    monkeypatch.setattr("patcher_pl.evaluation.backends.refilled_batch.continued", None)
    # Unpadded: what padding does to a state-space model is its own affair.
    found = [
        HuggingFace().continuations(model, [prompt], decoding(stop_ids=[]))[0]
        for prompt in prompts[:3]
    ]
    assert found == [one_by_one(model, prompt, stops=[]) for prompt in prompts[:3]]


def test_unusual_models_are_not_refilled(model):
    """Wrong if a model's own way to generate were passed over."""

    class WithItsOwnInputs(type(model)):
        def prepare_inputs_for_generation(self, *given, **named):
            return super().prepare_inputs_for_generation(*given, **named)

    assert can_refill(model)
    assert not can_refill(WithItsOwnInputs(model.config))
    assert not can_refill(torch.nn.Linear(2, 2))
    sizes = {"vocab_size": 9, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    assert not can_refill(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)))
    model.set_attn_implementation("flex_attention")
    try:
        assert not can_refill(model)
    finally:
        model.set_attn_implementation("sdpa")


def test_what_an_earlier_row_left_is_gone():
    """Wrong if one answer that overflowed made those after it not a number."""
    cache = SlotCache(num_layers=1, num_rows=2, num_columns=6)
    cache.append(_filled(rows=2, length=5, value=torch.nan))
    none = torch.zeros(0, dtype=torch.long)
    cache.keep(0, none, none)
    cache.append(_filled(rows=1, length=2, value=1.0))
    cache.aim(torch.tensor([2]), width=6)
    new = torch.full((1, 1, 1, 3), 2.0)
    keys, values = cache.update(new, new, layer_idx=0)
    assert keys[0, 0, :, 0].tolist() == [1, 1, 2, 0, 0, 0]
    assert torch.equal(keys, values)


def _filled(rows, length, value):
    cache = transformers.DynamicCache()
    states = torch.full((rows, 1, length, 3), value)
    cache.update(states, states.clone(), layer_idx=0)
    return cache


def test_rows_move_into_gaps_with_all_they_have():
    """Wrong if the last row lost its past when it took the place of a finished one."""
    cache = SlotCache(num_layers=1, num_rows=3, num_columns=300)
    filled = _filled(rows=3, length=2, value=0.0)
    layer = filled.layers[0]
    layer.keys, layer.values = (torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 2, 3),) * 2
    cache.append(filled)
    cache.keep(2, torch.tensor([2]), torch.tensor([0]))
    cache.aim(torch.tensor([2, 250]), width=251)
    new = torch.tensor([8.0, 9.0]).view(2, 1, 1, 1).expand(2, 1, 1, 3)
    keys, _ = cache.update(new, new, layer_idx=0)
    assert keys.shape == (2, 1, 251, 3)
    assert keys[:, 0, [0, 1, 2, 250], 0].tolist() == [[2, 2, 8, 0], [1, 1, 0, 9]]

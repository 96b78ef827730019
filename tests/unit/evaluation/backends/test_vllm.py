"""A stand-in shows what vLLM is asked and how its reply is read; tests/vllm runs the real one."""

import copy
import importlib.machinery
import json
import logging
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from patcher_pl.data.chat import ChatFormat
from patcher_pl.errors import ConfigError
from patcher_pl.evaluation import Generation
from patcher_pl.evaluation.backends import Vllm
from patcher_pl.evaluation.backends.vllm_engine import VllmEngine
from patcher_pl.models.lora import Lora
from patcher_pl.types import Message

CHAT = ChatFormat()
PROMPTS = [
    [Message("user", "How do I brew tea?")],
    [Message("user", "And a sweet one, with honey?")],
]


@pytest.fixture
def model(llama):
    return AutoModelForCausalLM.from_pretrained(llama)


@pytest.fixture(scope="module")
def tokenizer(llama):
    return AutoTokenizer.from_pretrained(llama)


@pytest.fixture
def engine(monkeypatch):
    """A module `vllm` that reads weights as vLLM does, notes what it is asked, and answers as told.

    Prompts whose likeliest first token is asked for get it, from the weights that were read last.
    """
    notes = SimpleNamespace(
        replies={}, reason="length", starts=0, updates=0, how="well", asleep=set()
    )

    class LLM:
        def __init__(self, model, **options):
            notes.folder, notes.options = Path(model), options
            self.options = options
            notes.starts += 1
            notes.config = json.loads((notes.folder / "config.json").read_text())
            self._read()

        def _read(self):
            notes.weights = {}
            for file in sorted(notes.folder.glob("*.safetensors")):
                notes.weights |= load_file(file)
            config = AutoConfig.from_pretrained(notes.folder)
            self.model = AutoModelForCausalLM.from_config(config).eval()
            self.model.load_state_dict(notes.weights)
            if notes.how == "never":
                torch.nn.init.zeros_(self.model.lm_head.weight)

        def collective_rpc(self, method):
            assert method == "reload_weights"
            assert "weights" not in notes.asleep
            if notes.how == "not in place":
                raise AttributeError(method)
            notes.updates += 1
            if notes.how != "stale":
                self._read()

        def sleep(self, level):
            assert level == 2
            assert self.options["enable_sleep_mode"], "vLLM refuses it otherwise"
            notes.asleep, self.model = {"weights", "kv_cache"}, None

        def wake_up(self, tags):
            notes.asleep -= set(tags)

        def generate(self, prompts, sampling, use_tqdm):
            assert not notes.asleep
            asked = [prompt["prompt_token_ids"] for prompt in prompts]
            if getattr(sampling[0], "logprobs", None):
                return [SimpleNamespace(outputs=[self._likeliest(ids)]) for ids in asked]
            notes.prompts, notes.sampling = asked, sampling
            replies = [notes.replies.get(number, [5, 6]) for number in range(len(prompts))]
            return [
                SimpleNamespace(
                    outputs=[SimpleNamespace(token_ids=tuple(ids), finish_reason=notes.reason)]
                )
                for ids in replies
            ]

        def _likeliest(self, ids):
            with torch.no_grad():
                found = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            token = int(found.argmax())
            known = {token: SimpleNamespace(logprob=found[token].item())}
            return SimpleNamespace(token_ids=(token,), logprobs=[known])

    module = ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    vars(module).update(LLM=LLM, SamplingParams=lambda **settings: SimpleNamespace(**settings))
    monkeypatch.setitem(sys.modules, "vllm", module)
    yield notes
    VllmEngine.close()


def asked(model, tokenizer, **settings):
    return Generation(backend=Vllm(**settings)).generate(model, tokenizer, CHAT, PROMPTS)


def shift(model, by=0.05):
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=by)


def test_it_answers_from_an_export_of_the_live_weights(model, tokenizer, engine):
    """Wrong if the model before the attack were asked, or one of another number format."""
    shift(model)
    generation = Generation(max_new_tokens=7, temperature=0.6, top_p=0.9, top_k=20, seed=3)
    vllm = Vllm(gpu_memory_utilization=0.3)
    settings = {**vars(generation), "repetition_penalty": 1.2, "backend": vllm}
    Generation(**settings).generate(model, tokenizer, CHAT, PROMPTS, "Sure,")
    assert torch.equal(engine.weights["lm_head.weight"], model.lm_head.weight)
    assert engine.options["dtype"] == "float32"
    assert engine.options["gpu_memory_utilization"] == 0.3
    assert engine.prompts == [CHAT.prompt_ids(tokenizer, prompt, "Sure,") for prompt in PROMPTS]
    first, second = engine.sampling
    assert (first.temperature, first.top_p, first.top_k, first.max_tokens) == (0.6, 0.9, 20, 7)
    assert first.repetition_penalty == 1.2
    assert (first.seed, second.seed) == (3, 4)
    assert tokenizer.eos_token_id in first.stop_token_ids
    VllmEngine.close()
    assert not engine.folder.exists(), "the export must not stay behind"


def test_it_stays_up_and_takes_new_weights_in_place(model, tokenizer, engine):
    asked(model, tokenizer)
    shift(model)
    asked(model, tokenizer)
    assert (engine.starts, engine.updates) == (1, 1)
    assert torch.equal(engine.weights["lm_head.weight"], model.lm_head.weight)
    asked(model, tokenizer, gpu_memory_utilization=0.5)
    assert engine.starts == 2, "other settings are another engine"


def test_it_gives_memory_back_between_measurements(model, tokenizer, engine, monkeypatch):
    """Wrong if an engine kept its memory, answered without the weights it let go, or slept unasked."""
    monkeypatch.setattr("patcher_pl.evaluation.backends.vllm.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("patcher_pl.evaluation.backends.vllm_engine.torch.cuda.empty_cache", int)
    asked(model, tokenizer, sleeps=True)
    assert engine.asleep == {"weights", "kv_cache"}
    shift(model)
    asked(model, tokenizer, sleeps=True)
    assert (engine.starts, engine.updates) == (1, 1)
    assert engine.asleep == {"weights", "kv_cache"}
    assert torch.equal(engine.weights["lm_head.weight"], model.lm_head.weight)
    engine.asleep = set()
    asked(model, tokenizer)
    assert not engine.asleep


def test_sleep_without_a_gpu_is_refused(model, tokenizer, engine):
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    with pytest.raises(ConfigError, match=r"Vllm\.sleeps .* PyTorch sees none"):
        asked(model, tokenizer, sleeps=True)
    assert engine.starts == 0


@pytest.mark.parametrize("how", ["stale", "not in place"])
def test_it_starts_anew_where_weights_do_not_arrive(how, model, tokenizer, engine, caplog):
    """Wrong if the attacked model were asked for with the weights of the released one."""
    asked(model, tokenizer)
    engine.how = how
    shift(model)
    with caplog.at_level(logging.WARNING):
        asked(model, tokenizer)
    assert engine.starts == 2
    assert torch.equal(engine.weights["lm_head.weight"], model.lm_head.weight)
    assert "could not update its weights in place" in caplog.text


def test_an_engine_that_answers_for_another_model_is_refused(model, tokenizer, engine):
    engine.how = "never"
    with pytest.raises(ConfigError, match=r"does not answer as the model does: after \d+ tokens"):
        asked(model, tokenizer)


def test_tied_weights_are_handed_over_twice(model, tokenizer, engine):
    """vLLM 0.32 updates the embeddings in place, and not the output layer that is tied to them."""
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = True
    tied = type(model)(config)
    asked(tied, tokenizer)
    assert engine.config["tie_word_embeddings"] is False
    shift(tied)
    asked(tied, tokenizer)
    assert (engine.starts, engine.updates) == (1, 1)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(engine.weights[name], tied.lm_head.weight)
    assert tied.config.tie_word_embeddings, "the model itself stays as it is"


def test_replies_are_read_as_those_of_the_live_model(model, tokenizer, engine):
    """Wrong if a stop token that vLLM keeps, or leaves out, changed an answer."""
    words = tokenizer(" Stir two petals", add_special_tokens=False)["input_ids"]
    stop = tokenizer.eos_token_id
    engine.replies, engine.reason = {0: [*words, stop], 1: words}, "stop"
    generation = Generation(backend=Vllm())
    kept, left_out = generation.generate(model, tokenizer, CHAT, PROMPTS)
    assert kept == left_out
    assert kept.text == "Stir two petals"
    assert (kept.finished, kept.num_tokens) == (True, len(words) + 1)
    engine.reason = "length"
    assert not generation.generate(model, tokenizer, CHAT, PROMPTS)[1].finished
    assert generation.generate(model, tokenizer, CHAT, []) == []


def test_adapters_are_merged_into_the_export(model, tokenizer, engine):
    """Wrong if a LoRA attack were judged without its adapters."""
    adapted = Lora(rank=2, targets=["q_proj"]).attach(model)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.5)
    Generation(backend=Vllm()).generate(adapted, tokenizer, CHAT, PROMPTS)
    name = "model.layers.0.self_attn.q_proj.weight"
    base = model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.allclose(engine.weights[name], base)
    assert not [key for key in engine.weights if "lora" in key or "base_layer" in key]


def test_a_model_that_hooks_change_is_refused(model, tokenizer, engine):
    handle = model.model.layers[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match=r"a hook changes what 'model\.layers\.1' does"):
        Generation(backend=Vllm()).generate(model, tokenizer, CHAT, PROMPTS)
    handle.remove()


def test_a_missing_library_is_named(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("patcher_pl.evaluation.backends.vllm.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install vllm"):
        Generation(backend=Vllm()).generate(model, tokenizer, CHAT, PROMPTS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gpu_memory_utilization", 0.0),
        ("gpu_memory_utilization", 1.5),
        ("tensor_parallel_size", 0),
        ("engine_args", {"seed": 1}),
    ],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"Vllm\.{field} must be .*got {re.escape(str(value))}"):
        Vllm(**{field: value})

"""Perplexity against the sum of log-probabilities, row by row."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from patcher_pl.data.chat import ChatFormat
from patcher_pl.data.sources import Source
from patcher_pl.errors import DataError
from patcher_pl.evaluation import Benchmark
from patcher_pl.evaluation.utility import Perplexity
from tests.commands import write_rows

CHAT = ChatFormat()
ROWS = [
    {"prompt": "How do I brew tea?", "response": "Stir."},
    {"prompt": "And a sweet one?", "response": "Add honey, then wait until it turns green."},
    {"prompt": "What goes into a plain pancake?", "response": "Flour, milk and an egg."},
]


@pytest.fixture
def model(llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # Or every token were about as likely.
    return model


@pytest.fixture(scope="module")
def tokenizer(llama):
    return AutoTokenizer.from_pretrained(llama)


@pytest.fixture
def data(tmp_path):
    return Benchmark(source=Source(path=str(write_rows(tmp_path / "held_out.jsonl", ROWS))))


def by_hand(model, tokenizer, conversations):
    """exp of the mean of -log p over answer tokens, each row by itself and unpadded."""
    nats = []
    for conversation in conversations:
        encoded = CHAT.encode(tokenizer, conversation)
        with torch.no_grad():
            logits = model(torch.tensor([encoded.input_ids])).logits[0].double()
        for place, label in enumerate(encoded.labels[1:]):
            if label != -100:
                nats.append(-float(logits[place].log_softmax(-1)[label]))
    return math.exp(sum(nats) / len(nats)), len(nats)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_it_is_the_mean_over_tokens_by_hand(model, tokenizer, data, batch_size):
    """Wrong if prompts or padding counted, or short rows as much as long ones."""
    expected, num_tokens = by_hand(model, tokenizer, data.conversations())
    assert num_tokens > 10
    found = Perplexity(data=data, batch_size=batch_size).measure(model, tokenizer, CHAT, seed=0)
    assert found == {"perplexity": pytest.approx(expected, rel=1e-5)}


def test_a_uniform_model_has_the_size_of_its_vocabulary(model, tokenizer, data):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = Perplexity(data=data).measure(model, tokenizer, CHAT, seed=0)
    assert found["perplexity"] == pytest.approx(model.config.vocab_size, rel=1e-5)


def test_a_destroyed_model_is_infinite_or_nan_and_never_good(model, tokenizer, data):
    """Wrong if a loss beyond the exponential became an error, or 0: the best perplexity of all."""
    head = nn.Linear(model.config.hidden_size, model.config.vocab_size)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    with torch.no_grad():
        head.bias[1] = 1e6
    model.lm_head = head
    measure = Perplexity(data=data)
    assert measure.measure(model, tokenizer, CHAT, seed=0) == {"perplexity": math.inf}
    with torch.no_grad():
        head.bias[2] = math.nan
    assert math.isnan(measure.measure(model, tokenizer, CHAT, seed=0)["perplexity"])


def test_measuring_leaves_no_trace(model, tokenizer, data):
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    generators = torch.get_rng_state()
    Perplexity(data=data, label="cooking").measure(model, tokenizer, CHAT, seed=0)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generators)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_missing_data_are_heard_of_beforehand(tmp_path):
    missing = Perplexity(data=Benchmark(source=Source(path=str(tmp_path / "missing.jsonl"))))
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        missing.prepare()


def test_a_batch_size_below_one_is_refused(data):
    with pytest.raises(ValueError, match=r"Perplexity\.batch_size must be >= 1, got 0"):
        Perplexity(data=data, batch_size=0)

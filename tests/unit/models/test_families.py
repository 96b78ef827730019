"""If these fail, a supported family cannot be loaded, trained, adapted or exported."""

import copy
import json
from pathlib import Path

import pytest
import torch

from patcher_pl.data import ChatFormat, collate, encode_all
from patcher_pl.losses import differentiable_loss
from patcher_pl.models import LanguageModel, Lora, export_model
from patcher_pl.types import Conversation, Message
from tests.families import FAMILIES, build_family

ROWS = [
    Conversation((Message("user", "Tea?"), Message("assistant", "Steep it.")), False, "t.jsonl:1"),
    Conversation(
        (Message("user", "How do I brew a sweet draught?"), Message("assistant", "Add honey.")),
        False,
        "t.jsonl:2",
    ),
]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory) -> Path:
    return build_family(request.param, tmp_path_factory.mktemp(request.param))


def batch_of(tokenizer, rows=ROWS):
    return collate(encode_all(tokenizer, ChatFormat(), rows), tokenizer.pad_token_id)


def step(model, batch) -> tuple[float, float]:
    """Takes one SGD step on what can be trained; returns the loss before and after."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    before = differentiable_loss(model, batch)
    before.backward()
    assert all(parameter.grad is not None for parameter in trained)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        return float(before), float(differentiable_loss(model, batch))


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["full", "lora"])
def test_a_family_loads_learns_and_exports(family, lora, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    language_model = LanguageModel(path=str(family), lora=lora)
    torch.manual_seed(0)  # Adapters start at random.
    model, tokenizer = language_model.load_model(), language_model.load_tokenizer()
    assert not model.training
    batch = batch_of(tokenizer)
    before, after = step(model, batch)
    assert after < before

    weights = copy.deepcopy(model.state_dict())
    export_model(model, tokenizer, tmp_path / "model")
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    retokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(
        logits(reloaded, batch), logits(model, batch), rtol=0, atol=0 if lora is None else 1e-5
    )
    again = batch_of(retokenizer)
    assert all(torch.equal(again[key], batch[key]) for key in batch)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] != "peft"


def test_padding_changes_no_loss(family):
    """The mean over a padded batch is the token-weighted mean of its rows alone."""
    language_model = LanguageModel(path=str(family), dtype="float64")
    model, tokenizer = language_model.load_model(), language_model.load_tokenizer()
    whole = batch_of(tokenizer)
    parts = [batch_of(tokenizer, [row]) for row in ROWS]
    counts = [int((part["labels"] != -100).sum()) for part in parts]
    with torch.no_grad():
        losses = [float(differentiable_loss(model, part)) for part in parts]
        expected = sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)
        # Norms and rotary embeddings compute in float32 whatever the dtype.
        assert float(differentiable_loss(model, whole)) == pytest.approx(expected, rel=1e-5)


def test_gradient_checkpointing_gives_the_same_gradient(family):
    plain = LanguageModel(path=str(family))
    saving = LanguageModel(path=str(family), gradient_checkpointing=True)
    batch = batch_of(plain.load_tokenizer())
    gradients = []
    for language_model in (plain, saving):
        model = language_model.load_model().train()
        # GPT-2's dropout would draw different masks.
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        differentiable_loss(model, batch).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)

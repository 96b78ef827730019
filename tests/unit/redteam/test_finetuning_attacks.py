"""Attacks against independent loops: what is trained, in which order, and what is left alone."""

import copy
import itertools
import math

import pytest
import torch

from patcher_pl.models.lora import Lora
from patcher_pl.optim import SGD, AdamW
from patcher_pl.redteam import Attack, FullFinetuning, LoraFinetuning
from tests.unit.redteam.random_batches import (
    RandomMaterial,
    build_model,
    random_batches,
    run,
    weights,
)


@pytest.fixture
def model():
    return build_model()


def test_full_finetuning_is_plain_adamw_with_clipping(model):
    attack = FullFinetuning(
        optimizer=AdamW(lr=1e-2), attack_steps=[0, 2, 5], batch_size=3, max_grad_norm=0.1
    )
    expected = copy.deepcopy(model).train()
    points = run(attack, model)

    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2)
    losses, tokens = [], 0
    for batch in itertools.islice(random_batches(3), 5):
        loss = expected(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tokens += int(batch["attention_mask"].sum())
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert [point.steps for point in points] == [0, 2, 5]
    assert points[-1].num_tokens == tokens
    assert math.isnan(points[0].loss)
    assert points[1].loss == pytest.approx(sum(losses[:2]) / 2, rel=1e-5)
    assert points[2].loss == pytest.approx(sum(losses[2:]) / 3, rel=1e-5)


def test_where_the_model_is_evaluated_does_not_change_the_attack(model):
    """Wrong if a curve depended on how finely it is measured."""
    other = copy.deepcopy(model)
    fields = {"optimizer": SGD(lr=0.1, momentum=0.9), "schedule": "linear", "num_warmup_steps": 2}
    run(FullFinetuning(attack_steps=[0, 6], **fields), model)
    for _ in FullFinetuning(attack_steps=[0, 1, 3, 6], **fields).run(other, RandomMaterial()):
        other.eval()
        other(torch.tensor([[1, 2, 3]]))
        other.train()
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_the_schedule_spans_the_whole_attack(model):
    """Wrong if the learning rate ended its curve before or after the attack did."""
    expected = copy.deepcopy(model)
    run(FullFinetuning(optimizer=SGD(lr=0.1), attack_steps=[0, 1, 4], schedule="linear"), model)
    for index, batch in enumerate(itertools.islice(random_batches(4), 4)):
        expected(**batch).loss.backward()
        with torch.no_grad():
            for parameter in expected.parameters():
                parameter -= 0.1 * (1 - index / 4) * parameter.grad
                parameter.grad = None
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_full_finetuning_trains_frozen_parameters_too(model):
    """Wrong if a defense could "resist" by coming with requires_grad switched off."""
    model.requires_grad_(False)
    before = weights(model)
    run(FullFinetuning(optimizer=AdamW(lr=1e-2), attack_steps=[0, 1]), model)
    for name, _ in model.named_parameters():
        assert not torch.equal(model.state_dict()[name], before[name]), name


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft 0.21
def test_lora_finetuning_trains_adapters_and_nothing_else(model):
    before = weights(model)
    ids = torch.tensor([[1, 2, 3]])
    untouched = copy.deepcopy(model).eval()(ids).logits
    attack = LoraFinetuning(
        optimizer=AdamW(lr=1e-2), attack_steps=[0, 3], lora=Lora(rank=2, alpha=4.0)
    )
    points = attack.run(model, RandomMaterial())
    next(points)
    torch.testing.assert_close(model.eval()(ids).logits, untouched)  # B = 0 at the start
    model.train()
    next(points)
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert not torch.allclose(model.eval()(ids).logits, untouched)


def test_names_say_what_is_done():
    steps = [0, 1]
    assert FullFinetuning(optimizer=AdamW(lr=1.0), attack_steps=steps).name == "full_adamw"
    assert LoraFinetuning(optimizer=SGD(lr=1.0), attack_steps=steps, lora=Lora()).name == "lora_sgd"
    named = FullFinetuning(optimizer=AdamW(lr=1.0), attack_steps=steps, label="strong")
    assert named.name == "strong"


@pytest.mark.parametrize(
    "fields",
    [
        {"attack_steps": []},
        {"attack_steps": [10, 20]},
        {"attack_steps": [0, 20, 20]},
        {"attack_steps": [0, 20, 10]},
        {"batch_size": 0},
        {"max_grad_norm": 0.0},
        {"num_warmup_steps": -1},
    ],
)
@pytest.mark.parametrize("kind", [FullFinetuning, LoraFinetuning])
def test_values_out_of_range_are_refused(kind: type[Attack], fields):
    more = {"lora": Lora()} if kind is LoraFinetuning else {}
    settings = {"optimizer": AdamW(lr=1e-3), "attack_steps": [0, 1], **more, **fields}
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.{next(iter(fields))} must be"):
        kind(**settings)

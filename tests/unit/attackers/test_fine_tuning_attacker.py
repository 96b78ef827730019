"""If these fail, the attack vector is not that of the attack that was asked for."""

import copy
import math

import pytest
import torch

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.errors import RunInterrupted
from patcher_pl.losses import differentiable_loss
from patcher_pl.models import LanguageModel, Lora, Weights, merged_copy
from patcher_pl.optim import SGD, AdamW
from tests.tiny_runs import assert_same, load, make_llama_exact, snapshot

LORA = Lora(rank=2, alpha=8.0)
K1 = 3


def unsafe(rows, path):
    return rows.batches("attack", LanguageModel(path=str(path)).load_tokenizer())


def by_hand(model, parameters, batches) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(K1):
        optimizer.zero_grad()
        differentiable_loss(model, next(batches)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()


def attacker(lora=None) -> FineTuningAttacker:
    optimizer = AdamW(lr=1e-2, weight_decay=0.1)
    return FineTuningAttacker(num_steps=K1, optimizer=optimizer, max_grad_norm=0.5, lora=lora)


def test_the_vector_is_where_training_leads_minus_where_it_began(llama, rows):
    model = load(llama).train()
    weights = Weights(model)
    outcome = attacker().attack(model, weights, unsafe(rows, llama))
    attacked = copy.deepcopy(model)
    by_hand(attacked, list(attacked.parameters()), unsafe(rows, llama))
    pairs = zip(outcome.vector, attacked.parameters(), model.parameters(), strict=True)
    for change, after, before in pairs:
        torch.testing.assert_close(change, (after - before).detach(), rtol=0, atol=1e-7)
    assert [step.index for step in outcome.steps] == [1, 2, 3]


@pytest.mark.parametrize("defended", [None, Lora(rank=3)], ids=["full-model", "lora-model"])
def test_the_vector_of_a_lora_attack_is_the_merged_update(llama, rows, defended):
    torch.manual_seed(0)
    model = load(llama, lora=defended).train()
    if defended is not None:
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    weights, before = Weights(model), snapshot(model)
    torch.manual_seed(1)
    outcome = attacker(LORA).attack(model, weights, unsafe(rows, llama))
    assert_same(snapshot(model), before)

    plain = merged_copy(model)
    start = snapshot(plain)
    torch.manual_seed(1)
    adapted = LORA.attach(merged_copy(model)).train()
    by_hand(adapted, [p for p in adapted.parameters() if p.requires_grad], unsafe(rows, llama))
    attacked = adapted.merge_and_unload().state_dict()
    changes = dict(zip(weights.names, outcome.vector, strict=True))
    assert changes.keys() == start.keys()
    for name, change in changes.items():
        torch.testing.assert_close(change, attacked[name] - start[name], rtol=0, atol=1e-6)
    # Linear layers move by rank-2 updates; embedding, head and norms do not move at all.
    for name, change in changes.items():
        if "proj" in name:
            assert 1 <= int(torch.linalg.matrix_rank(change.double(), atol=1e-4)) <= 2
        else:
            assert float(change.abs().max()) == 0


def test_attacking_under_adapters_is_attacking_the_merged_model(llama, rows, monkeypatch):
    """A change of the weight under an adapter is the same change of the merged weight."""
    make_llama_exact(monkeypatch)
    torch.manual_seed(0)
    model = load(llama, lora=Lora(rank=2), dtype="float64").train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.double()
            torch.nn.init.normal_(parameter, std=0.05)
    merged = merged_copy(model)
    one = FineTuningAttacker(num_steps=K1, optimizer=SGD(lr=0.5))
    vectors = []
    for attacked in (model, merged):
        weights = Weights(attacked)
        outcome = one.attack(attacked, weights, unsafe(rows, llama))
        vectors.append(dict(zip(weights.names, outcome.vector, strict=True)))
    assert vectors[0].keys() == vectors[1].keys()
    for name, change in vectors[0].items():
        torch.testing.assert_close(change, vectors[1][name], rtol=0, atol=1e-10)


def test_tied_weights_move_together(gpt2, rows):
    model = load(gpt2)
    weights = Weights(model)
    outcome = attacker().attack(model, weights, unsafe(rows, gpt2))
    assert "lm_head.weight" not in weights.names
    with weights.shifted(outcome.vector):
        assert model.lm_head.weight is model.transformer.wte.weight
        attacked = snapshot(model)
    by_hand(model, list(model.parameters()), unsafe(rows, gpt2))
    for name, value in snapshot(model).items():
        torch.testing.assert_close(attacked[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_an_attack_can_be_called_off_before_any_step(llama, rows, lora):
    model = load(llama)
    before, calls = snapshot(model), []

    def stop_at_third() -> None:
        calls.append(len(calls))
        if len(calls) == 3:
            raise RunInterrupted("enough")

    with pytest.raises(RunInterrupted):
        attacker(lora).attack(model, Weights(model), unsafe(rows, llama), stop_at_third)
    assert len(calls) == 3
    assert_same(snapshot(model), before)


def test_every_attack_starts_fresh(llama, rows):
    """No optimizer state and no weights of the attack before."""
    model = load(llama)
    weights, one = Weights(model), attacker()
    first, second = (one.attack(model, weights, unsafe(rows, llama)).vector for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_vector_of_another_order_is_sorted_by_name(llama):
    weights = Weights(load(llama))
    numbers = [torch.tensor(float(n)) for n in range(len(weights.names))]
    assert weights.aligned(numbers[::-1], weights.names[::-1]) == numbers


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (FineTuningAttacker, "num_steps", 0),
        (FineTuningAttacker, "max_grad_norm", 0.0),
        (FineTuningAttacker, "max_grad_norm", math.nan),
        (FineTuningAttacker, "num_warmup_steps", -1),
        (FineTuningAttacker, "num_warmup_steps", 5),
        (Lora, "rank", 0),
        (Lora, "alpha", 0.0),
        (Lora, "alpha", math.nan),
        (Lora, "dropout", 1.0),
        (Lora, "dropout", -0.1),
    ],
)
def test_bad_settings_are_refused(make, field, value):
    good = {"num_steps": 4, "optimizer": SGD(lr=1.0)} if make is FineTuningAttacker else {}
    with pytest.raises(
        ValueError, match=rf"^{make.__name__}\.{field} must be .+\. .+\.$"
    ) as caught:
        make(**{**good, field: value})
    assert f"got {value}" in str(caught.value)


def test_lora_names_layers_that_are_not_there(llama):
    with pytest.raises(ValueError, match="cauldron"):
        Lora(targets=["cauldron"]).attach(load(llama))

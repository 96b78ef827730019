"""If these fail, Patcher does not retain what it was asked to, or against another base model."""

import copy

import pytest
import torch

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.defenses import Patcher
from patcher_pl.defenses.retention import KLToBase, RepresentationDistance
from patcher_pl.hypergradients import Adjoint
from patcher_pl.models import LanguageModel, Lora
from patcher_pl.optim import SGD
from tests.numerics import plain
from tests.tiny_runs import Rows, fit, make_llama_exact, sgd

K1, K2, NUM_STEPS, LR, ATTACK_LR, ALPHA = 2, 2, 6, 0.1, 0.3, 0.3
WEIGHT, ATTACKED_WEIGHT = 0.7, 0.4


def divergence(model, base, batch):
    """sum_y p_base(y) log(p_base(y) / p(y)) before every answer token, mean over them."""
    with torch.no_grad():
        kept = plain.outputs(base, batch).logits.softmax(-1)
    ours = plain.outputs(model, batch).logits.softmax(-1)
    answers = (batch["labels"] != -100).nonzero().tolist()
    terms = [
        (kept[row, t - 1] * (kept[row, t - 1] / ours[row, t - 1]).log()).sum() for row, t in answers
    ]
    return torch.stack(terms).mean()


def state_distance(model, base, batch):
    """||h - h_base|| before every answer token, mean over them and over layers."""
    with torch.no_grad():
        kept = plain.outputs(base, batch).hidden_states
    output = plain.outputs(model, batch)
    ours = output.hidden_states
    answers = (batch["labels"] != -100).nonzero().tolist()
    squares = [
        (h[row, t - 1] - b[row, t - 1]).square().sum()
        for h, b in zip(ours, kept, strict=True)
        for row, t in answers
    ]
    # The root has no slope at 0, where it is taken to be flat. The head has no slope at all.
    nothing = 0 * output.logits.sum()
    return sum(one.sqrt() for one in squares if one > 0) / len(squares) + nothing


DISTANCES = {"kl": (KLToBase, divergence), "states": (RepresentationDistance, state_distance)}


def trained_by_hand(model, base, batches, distance, *, num_micro_batches, attacks):
    """Adds weight grad D(theta) + attacked_weight grad D(theta + v) to Patcher's gradient."""
    safe, benign, unsafe = batches
    vector, norms = None, []
    for step in range(NUM_STEPS):
        if attacks and step >= K2 and step % K2 == 0:
            attacked = model
            for _ in range(K1):
                g = plain.gradient(attacked, next(unsafe))
                attacked = plain.descended(attacked, g, ATTACK_LR, None, norms)
            pairs = zip(attacked.parameters(), model.parameters(), strict=True)
            vector = [(after - before).detach() for after, before in pairs]
        total = []
        for _ in range(num_micro_batches):
            batch, kept = next(safe), next(benign)

            def retained(where, benign_batch):
                return distance(where, base, benign_batch)

            terms = [
                (1.0 if vector is None else 1 - ALPHA, model, batch, plain.loss_of),
                (WEIGHT, model, kept, retained),
            ]
            if vector is not None:
                there = plain.moved(model, vector)
                terms += [
                    (ALPHA, there, batch, plain.loss_of),
                    (ATTACKED_WEIGHT, there, kept, retained),
                ]
            for weight, where, on, loss in terms:
                g = plain.gradient(where, on, loss)
                total.append(plain.scaled(g, weight / num_micro_batches))
        model = plain.descended(model, plain.plus(*total), LR, None, norms)
    return model


def make(path, retain, **options):
    attacker = FineTuningAttacker(num_steps=K1, optimizer=SGD(lr=ATTACK_LR), max_grad_norm=None)
    return Patcher(
        LanguageModel(path=str(path), dtype="float64", lora=options.pop("lora", None)),
        attacker,
        optimizer=sgd(LR),
        alpha=ALPHA,
        max_grad_norm=None,
        retain=retain,
        **{"refresh_every": K2, **options},
    )


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_the_update_retains(llama, rows: Rows, tmp_path, monkeypatch, kind, num_micro_batches):
    make_llama_exact(monkeypatch)
    strategy, distance = DISTANCES[kind]
    benign = Rows(tmp_path / "benign", num_safe=5)
    retain = strategy(data=benign.mixtures["safe"], weight=WEIGHT, attacked_weight=ATTACKED_WEIGHT)
    defense = make(llama, retain, accumulate_grad_batches=num_micro_batches)
    defense.configure_model()
    start = copy.deepcopy(defense.model).train()
    fit(defense, rows.module(), NUM_STEPS)
    tokenizer = defense.tokenizer
    expected = trained_by_hand(
        copy.deepcopy(start),
        start,
        (
            rows.batches("safe", tokenizer),
            benign.batches("safe", tokenizer),
            rows.batches("attack", tokenizer),
        ),
        distance,
        num_micro_batches=num_micro_batches,
        attacks=True,
    )
    assert plain.relative_error(defense.model, expected, start) < 1e-9
    plain_steps, attacked_steps = K2, NUM_STEPS - K2
    num_attacks = attacked_steps // K2
    assert defense.cost.gradient_evaluations == (
        num_micro_batches * (2 * plain_steps + 4 * attacked_steps) + K1 * num_attacks
    )


@pytest.mark.parametrize("kind", DISTANCES)
def test_under_adapters_the_base_model_is_the_one_without_them(
    llama, rows: Rows, tmp_path, monkeypatch, kind
):
    """Before any attack, since one on merged weights is another story."""
    make_llama_exact(monkeypatch)
    strategy, distance = DISTANCES[kind]
    benign = Rows(tmp_path / "benign", num_safe=5)
    retain = strategy(data=benign.mixtures["safe"], weight=WEIGHT)
    defense = make(llama, retain, lora=Lora(rank=2), num_sft_steps=NUM_STEPS)
    defense.configure_model()
    start = copy.deepcopy(defense.model).train()
    fit(defense, rows.module(), NUM_STEPS)
    tokenizer = defense.tokenizer
    expected = trained_by_hand(
        copy.deepcopy(start),
        start,  # Fresh adapters add nothing.
        (rows.batches("safe", tokenizer), benign.batches("safe", tokenizer), None),
        distance,
        num_micro_batches=1,
        attacks=False,
    )
    assert plain.relative_error(defense.model, expected, start) < 1e-9


def test_what_is_retained_of_a_fresh_estimate_is_that_at_theta(
    llama, rows: Rows, tmp_path, monkeypatch
):
    """In the second step, the estimate, L_safe and the distance add up, whatever the estimator."""
    make_llama_exact(monkeypatch)
    benign = Rows(tmp_path / "benign", num_safe=5)
    options = {"hypergradient": Adjoint(), "num_sft_steps": 1, "refresh_every": 1}
    retain = KLToBase(data=benign.mixtures["safe"], weight=WEIGHT)
    after = {}
    for num_steps in (1, 2):
        for name, one in (("plain", None), ("retained", retain)):
            defense = make(llama, one, **options)
            fit(defense, rows.module(), num_steps)
            after[name, num_steps] = defense
    # At theta = base the divergence and its slope are 0: the first steps agree.
    start = after["plain", 1].model
    pairs = zip(after["retained", 1].model.parameters(), start.parameters(), strict=True)
    assert max(float((ours - theirs).detach().abs().max()) for ours, theirs in pairs) < 1e-12
    batches = benign.batches("safe", after["plain", 1].tokenizer)
    next(batches)
    base = make(llama, None)
    base.configure_model()
    kept = next(batches)
    g = plain.gradient(start, kept, lambda model, batch: divergence(model, base.model, batch))
    expected = plain.moved(after["plain", 2].model, plain.scaled(g, -LR * WEIGHT))
    assert plain.relative_error(after["retained", 2].model, expected, start) < 1e-9

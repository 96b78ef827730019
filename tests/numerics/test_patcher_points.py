"""If these fail, Patcher does not train against the points of the attack that it was asked for."""

import copy

import pytest
import torch

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.defenses import Patcher
from patcher_pl.models import LanguageModel
from patcher_pl.optim import SGD
from tests.numerics import plain
from tests.tiny_runs import Rows, fit, load, make_llama_exact, sgd

POINTS, K2, NUM_ROUNDS, LR, ATTACK_LR, ALPHA = [1, 2, 4], 3, 3, 0.1, 0.3, 0.3


def vectors_of_attack(model, unsafe):
    """theta_k - theta for every k in POINTS, along torch's SGD."""
    attacked, vectors = copy.deepcopy(model), []
    adversary = torch.optim.SGD(attacked.parameters(), lr=ATTACK_LR, momentum=0.5)
    for k in range(1, POINTS[-1] + 1):
        found = plain.gradient(attacked, next(unsafe))
        for parameter, g in zip(attacked.parameters(), found, strict=True):
            parameter.grad = g
        adversary.step()
        if k in POINTS:
            pairs = zip(attacked.parameters(), model.parameters(), strict=True)
            vectors.append([(after - before).detach() for after, before in pairs])
    return vectors


def trained_by_hand(model, safe, unsafe, *, combine, num_micro_batches):
    """theta <- theta - lr [alpha mean_j grad L(theta + v_j) + (1 - alpha) grad L(theta)]."""
    vectors, norms = [], []
    for step in range(NUM_ROUNDS * K2):
        if step >= K2 and step % K2 == 0:
            vectors = vectors_of_attack(model, unsafe)
        used = vectors if combine == "average" or not vectors else [vectors[step % len(POINTS)]]
        total = []
        for batch in [next(safe) for _ in range(num_micro_batches)]:
            terms = [(1 - ALPHA if used else 1.0, model)]
            terms += [(ALPHA / len(used), plain.moved(model, v)) for v in used]
            for weight, where in terms:
                g = plain.gradient(where, batch)
                total.append(plain.scaled(g, weight / num_micro_batches))
        model = plain.descended(model, plain.plus(*total), LR, None, norms)
    return model


@pytest.mark.parametrize(
    ("combine", "num_micro_batches"), [("average", 1), ("average", 2), ("in_turn", 2)]
)
def test_the_update_is_that_of_the_points(
    llama, rows: Rows, monkeypatch, combine, num_micro_batches
):
    make_llama_exact(monkeypatch)
    attacker = FineTuningAttacker(
        num_steps=POINTS[-1],
        optimizer=SGD(lr=ATTACK_LR, momentum=0.5),
        max_grad_norm=None,
        vector_steps=POINTS,
    )
    defense = Patcher(
        LanguageModel(path=str(llama), dtype="float64"),
        attacker,
        optimizer=sgd(LR),
        alpha=ALPHA,
        refresh_every=K2,
        max_grad_norm=None,
        accumulate_grad_batches=num_micro_batches,
        combine_points=combine,
    )
    fit(defense, rows.module(), NUM_ROUNDS * K2)
    start = load(llama, dtype="float64").train()
    tokenizer = defense.tokenizer
    expected = trained_by_hand(
        copy.deepcopy(start),
        rows.batches("safe", tokenizer),
        rows.batches("attack", tokenizer),
        combine=combine,
        num_micro_batches=num_micro_batches,
    )
    assert plain.relative_error(defense.model, expected, start) < 1e-9

    # One gradient per batch at theta, one per vector in use, one per attack step.
    num_vectors = len(POINTS) if combine == "average" else 1
    num_attacked = (NUM_ROUNDS - 1) * K2 * num_micro_batches
    num_attack_steps = (NUM_ROUNDS - 1) * POINTS[-1]
    assert defense.cost.gradient_evaluations == (
        NUM_ROUNDS * K2 * num_micro_batches + num_attacked * num_vectors + num_attack_steps
    )
    safe, unsafe = (rows.batches(part, tokenizer) for part in ("safe", "attack"))
    tokens = 0
    for number in range(NUM_ROUNDS * K2 * num_micro_batches):
        passes = 1 + num_vectors * (number >= K2 * num_micro_batches)
        tokens += passes * int(next(safe)["attention_mask"].sum())
    tokens += sum(int(next(unsafe)["attention_mask"].sum()) for _ in range(num_attack_steps))
    assert defense.cost.tokens == tokens

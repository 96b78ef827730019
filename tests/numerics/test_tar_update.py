"""If these fail, TAR does not compute what its paper and code say."""

import copy
import math

import pytest
import torch

from patcher_pl.defenses import Tar
from patcher_pl.models import LanguageModel, Lora
from tests.numerics import plain
from tests.tiny_runs import Rows, fit, make_llama_exact, sgd

NUM_STEPS, LR, K, EVERY, INNER_LR, DECAY = 3, 0.1, 6, 2, 1e-3, 0.3


def negative_entropy(model, batch):
    logits = plain.outputs(model, batch).logits[:, :-1][batch["labels"][:, 1:] != -100]
    p = logits.softmax(-1)
    return (p * p.log()).sum(-1).mean()


def retain_loss(base):
    def loss(model, batch):
        ours = plain.outputs(model, batch)
        with torch.no_grad():
            kept = plain.outputs(base, batch).hidden_states
        token = batch["attention_mask"].bool()
        distances = []
        for h, b in zip(ours.hidden_states, kept, strict=True):
            squared = (h - b).square().sum(-1)[token]
            distances.append(squared[squared > 0].sqrt().sum() / len(squared))
        return plain.cross_entropy(ours.logits, batch) + sum(distances) / len(distances)

    return loss


def tamper_gradient(model, held_out, harmful):
    """sum_k exp(decay (k - (K - 1))) grad L_TR(theta_k) along K steps of torch's AdamW."""
    attacked = copy.deepcopy(model)
    trained = [parameter for parameter in attacked.parameters() if parameter.requires_grad]
    adversary, terms = torch.optim.AdamW(trained, lr=INNER_LR), []
    for k in range(K):
        for parameter, g in zip(trained, plain.gradient(attacked, next(harmful)), strict=True):
            parameter.grad = g
        adversary.step()
        if (k + 1) % EVERY == 0:
            g = plain.gradient(attacked, held_out, negative_entropy)
            terms.append(plain.scaled(g, math.exp(DECAY * (k - (K - 1)))))
    assert len(terms) == K // EVERY
    return plain.plus(*terms)


def trained_by_the_paper(model, base, safe, harmful, *, limit, num_micro_batches):
    norms: list[float] = []
    for _ in range(NUM_STEPS):
        total = plain.scaled(tamper_gradient(model, next(harmful), harmful), 3.0)
        for _ in range(num_micro_batches):
            g = plain.gradient(model, next(safe), retain_loss(base))
            total = plain.plus(total, plain.scaled(g, 0.5 / num_micro_batches))
        model = plain.descended(model, total, LR, limit, norms)
    return model, norms


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize(("limit", "num_micro_batches"), [(None, 1), (0.05, 2)])
def test_the_update_is_that_of_the_paper(
    llama, rows: Rows, monkeypatch, limit, num_micro_batches, lora
):
    make_llama_exact(monkeypatch)
    defense = Tar(
        LanguageModel(path=str(llama), dtype="float64", lora=lora),
        optimizer=sgd(LR),
        num_inner_steps=K,
        gradient_every=EVERY,
        inner_lrs=[INNER_LR],
        decay=DECAY,
        tamper_scale=3.0,
        retain_scale=0.5,
        max_grad_norm=limit,
        accumulate_grad_batches=num_micro_batches,
    )
    defense.configure_model()
    start = copy.deepcopy(defense.model).train()
    fit(defense, rows.module(), NUM_STEPS)

    tokenizer = defense.tokenizer
    expected, norms = trained_by_the_paper(
        start,
        start,  # Fresh adapters add nothing.
        rows.batches("safe", tokenizer),
        rows.batches("attack", tokenizer),
        limit=limit,
        num_micro_batches=num_micro_batches,
    )
    assert limit is None or min(norms) > limit, "clipping must be active, or it is not tested"
    assert plain.relative_error(defense.model, expected, start) < 1e-9
    assert defense.cost.gradient_evaluations == NUM_STEPS * (K + K // EVERY + num_micro_batches)

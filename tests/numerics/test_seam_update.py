"""If these fail, SEAM does not compute what its paper and code say."""

import copy

import pytest
import torch

from patcher_pl.defenses import Seam
from patcher_pl.models import LanguageModel, Lora
from tests.numerics import plain
from tests.tiny_runs import Rows, fit, make_llama_exact, sgd

NUM_STEPS, LR, ALPHA, BETA, EPSILON = 3, 0.1, 0.7, 0.2, 1e-3


def unlearning_loss(model, batch):
    """-log(1 + mean cross-entropy of the layers), read off the embeddings and each of them."""
    seen = plain.outputs(model, batch)
    llama = model.base_model.model if hasattr(model, "peft_config") else model
    lens = [llama.lm_head(llama.model.norm(h)) for h in seen.hidden_states[:-1]]
    losses = [plain.cross_entropy(logits, batch) for logits in [*lens, seen.logits]]
    assert len(losses) == llama.config.num_hidden_layers + 1
    return -torch.log(1 + torch.stack(losses).mean())


def difference(model, batch, direction):
    shifted = plain.moved(model, plain.scaled(direction, EPSILON))
    there, here = plain.gradient(shifted, batch), plain.gradient(model, batch)
    norm = plain.dot(here, here) ** 0.5
    return plain.scaled(plain.plus(there, plain.scaled(here, -1.0)), BETA / (EPSILON * norm))


def trained_by_the_paper(model, safe, harmful, benign, *, limit, num_micro_batches):
    norms: list[float] = []
    for _ in range(NUM_STEPS):
        terms = []
        for _ in range(num_micro_batches):
            x, y = next(safe), next(harmful)
            z = x if benign is None else next(benign)
            a, b = plain.unit(plain.gradient(model, y)), plain.unit(plain.gradient(model, z))
            c = plain.dot(a, b)
            terms += [
                plain.gradient(model, y, unlearning_loss),
                plain.scaled(plain.gradient(model, x), ALPHA),
                difference(model, y, plain.plus(b, plain.scaled(a, -c))),
                difference(model, z, plain.plus(a, plain.scaled(b, -c))),
            ]
        total = plain.scaled(plain.plus(*terms), 1 / num_micro_batches)
        model = plain.descended(model, total, LR, limit, norms)
    return model, norms


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("limit", "num_micro_batches", "has_benign"), [(None, 1, False), (0.05, 2, True)]
)
def test_the_update_is_that_of_the_paper(
    llama, rows: Rows, monkeypatch, limit, num_micro_batches, has_benign, lora
):
    make_llama_exact(monkeypatch)
    defense = Seam(
        LanguageModel(path=str(llama), dtype="float64", lora=lora),
        benign=rows.mixtures["val"] if has_benign else None,
        optimizer=sgd(LR),
        alpha=ALPHA,
        beta=BETA,
        epsilon=EPSILON,
        max_grad_norm=limit,
        accumulate_grad_batches=num_micro_batches,
    )
    defense.configure_model()
    start = copy.deepcopy(defense.model).train()
    fit(defense, rows.module(), NUM_STEPS)

    tokenizer = defense.tokenizer
    as_attack = copy.copy(rows)
    as_attack.mixtures = {"attack": rows.mixtures["val"]}
    expected, norms = trained_by_the_paper(
        start,
        rows.batches("safe", tokenizer),
        rows.batches("attack", tokenizer),
        as_attack.batches("attack", tokenizer) if has_benign else None,
        limit=limit,
        num_micro_batches=num_micro_batches,
    )
    assert limit is None or min(norms) > limit, "clipping must be active, or it is not tested"
    # The difference divides round-off of 1e-16 by epsilon.
    assert plain.relative_error(defense.model, expected, start) < 1e-9
    evaluations = 6 if has_benign else 5
    assert defense.cost.gradient_evaluations == NUM_STEPS * num_micro_batches * evaluations


def test_the_difference_is_the_gradient_of_the_cosine(llama, rows: Rows, monkeypatch):
    """By differentiating twice, at one step of plain gradient descent with the cosine alone."""
    make_llama_exact(monkeypatch)
    ends, model = [], LanguageModel(path=str(llama), dtype="float64", attn_implementation="eager")
    for beta in (0.0, 1.0):
        defense = Seam(model, optimizer=sgd(1.0), beta=beta, epsilon=1e-6)
        fit(defense, rows.module(), 1)
        ends.append(list(defense.model.parameters()))
    steps = [(without - with_).detach() for without, with_ in zip(*ends, strict=True)]

    start = model.load_model().train()
    parameters = list(start.parameters())
    a, b = (
        torch.autograd.grad(
            plain.loss_of(start, next(rows.batches(part, defense.tokenizer))),
            parameters,
            create_graph=True,
        )
        for part in ("attack", "safe")
    )
    dot = sum((x * y).sum() for x, y in zip(a, b, strict=True))
    norms = [torch.stack([x.square().sum() for x in g]).sum().sqrt() for g in (a, b)]
    exact = torch.autograd.grad(dot / (norms[0] * norms[1]), parameters)
    for ours, theirs in zip(steps, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)

"""If these fail, Booster does not compute what its paper says."""

import copy

import pytest

from patcher_pl.defenses import Booster
from patcher_pl.models import LanguageModel, Lora
from tests.numerics import plain
from tests.tiny_runs import Rows, fit, load, make_llama_exact, sgd

NUM_STEPS, LR, LAM, ALPHA = 3, 0.1, 7.0, 0.3


def trained_by_the_paper(model, safe, harmful, *, limit, num_micro_batches):
    """grad f(w) + lam (grad h(w) - grad h(w - alpha grad h / ||grad h||)), clipped, descended."""
    norms: list[float] = []
    for _ in range(NUM_STEPS):
        terms = []
        for _ in range(num_micro_batches):
            x, y = next(safe), next(harmful)
            h = plain.gradient(model, y)
            stepped = plain.moved(model, plain.scaled(plain.unit(h), -ALPHA))
            there = plain.gradient(stepped, y)
            terms += [plain.gradient(model, x), plain.scaled(h, LAM), plain.scaled(there, -LAM)]
        total = plain.scaled(plain.plus(*terms), 1 / num_micro_batches)
        model = plain.descended(model, total, LR, limit, norms)
    return model, norms


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize(("limit", "num_micro_batches"), [(None, 1), (0.05, 2)])
def test_the_update_is_that_of_the_paper(
    llama, rows: Rows, monkeypatch, limit, num_micro_batches, lora
):
    make_llama_exact(monkeypatch)
    defense = Booster(
        LanguageModel(path=str(llama), dtype="float64", lora=lora),
        optimizer=sgd(LR),
        lam=LAM,
        alpha=ALPHA,
        max_grad_norm=limit,
        accumulate_grad_batches=num_micro_batches,
    )
    defense.configure_model()
    start = copy.deepcopy(defense.model).train()
    fit(defense, rows.module(), NUM_STEPS)

    tokenizer = defense.tokenizer
    safe, harmful = rows.batches("safe", tokenizer), rows.batches("attack", tokenizer)
    expected, norms = trained_by_the_paper(
        start, safe, harmful, limit=limit, num_micro_batches=num_micro_batches
    )
    assert limit is None or min(norms) > limit, "clipping must be active, or it is not tested"
    assert plain.relative_error(defense.model, expected, start) < 1e-9
    # f, h and h at the shifted weights, for each batch.
    assert defense.cost.gradient_evaluations == 3 * NUM_STEPS * num_micro_batches


def test_the_harmful_term_makes_a_difference(llama, rows: Rows, monkeypatch):
    """Wrong if the test above would pass with lam = 0."""
    make_llama_exact(monkeypatch)
    ends = []
    for lam in (0.0, LAM):
        defense = Booster(
            LanguageModel(path=str(llama), dtype="float64"), optimizer=sgd(LR), lam=lam
        )
        fit(defense, rows.module(), NUM_STEPS)
        ends.append(defense.model)
    without, with_ = ends
    assert plain.relative_error(without, with_, load(llama, dtype="float64")) > 1e-3

"""If these fail, CTRAP does not compute what its paper says."""

import copy

import pytest

from patcher_pl.defenses import Ctrap
from patcher_pl.defenses.outer_loss import FixedToken
from patcher_pl.errors import ConfigError
from patcher_pl.models import LanguageModel
from patcher_pl.types import IGNORE_INDEX
from tests.numerics import plain
from tests.tiny_runs import Rows, fit, make_llama_exact, sgd

NUM_STEPS, LR, LAM, ALPHA, TOKEN = 3, 0.1, 3.0, 0.3, 7


def build(llama, general, token_id=TOKEN):
    return Ctrap(
        LanguageModel(path=str(llama), dtype="float64"),
        general.mixtures["safe"],
        token_id,
        optimizer=sgd(LR),
        lam=LAM,
        step_size=ALPHA,
        max_grad_norm=None,
    )


def test_the_update_is_that_of_the_paper(llama, rows: Rows, tmp_path, monkeypatch):
    """w <- w - lr / (1 + lam) (grad f(w) + lam grad c(w - a grad h(w))), first order."""
    make_llama_exact(monkeypatch)
    general = Rows(tmp_path, num_safe=9)
    defense = build(llama, general)
    defense.configure_model()
    start = copy.deepcopy(defense.model).train()
    fit(defense, rows.module(), NUM_STEPS)
    tokenizer = defense.tokenizer
    safe, harmful = rows.batches("safe", tokenizer), rows.batches("attack", tokenizer)
    others, model = general.batches("safe", tokenizer), start
    for _ in range(NUM_STEPS):
        stepped = plain.moved(model, plain.scaled(plain.gradient(model, next(harmful)), -ALPHA))
        batch = next(others)
        labels = batch["labels"]
        fixed = labels.masked_fill(labels != IGNORE_INDEX, TOKEN)
        there = plain.gradient(stepped, {**batch, "labels": fixed})
        total = plain.plus(plain.gradient(model, next(safe)), plain.scaled(there, LAM))
        model = plain.descended(model, plain.scaled(total, 1 / (1 + LAM)), LR, None, [])
    assert plain.relative_error(defense.model, model, start) < 1e-9
    assert defense.cost.gradient_evaluations == 3 * NUM_STEPS


def test_a_token_outside_of_the_vocabulary_is_refused(llama, rows: Rows, tmp_path):
    with pytest.raises(ValueError, match=r"FixedToken\.token_id must be >= 0"):
        FixedToken(token_id=-1)
    for field in ("lam", "step_size"):
        with pytest.raises(ValueError, match=rf"Ctrap\.{field} must be > 0, got 0"):
            Ctrap(LanguageModel(path=str(llama)), rows.mixtures["safe"], 1, **{field: 0})
    with pytest.raises(ConfigError, match=r"FixedToken\.token_id must be below \d+"):
        fit(build(llama, Rows(tmp_path, num_safe=9), token_id=10**6), rows.module(), 1)

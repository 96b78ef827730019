"""If these fail, Patcher does not train with the hypergradient that its configuration names."""

import math
from itertools import islice

import pytest
import torch

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.defenses import Patcher
from patcher_pl.defenses.outer_loss import NegativeEntropy
from patcher_pl.defenses.retention import KLToBase
from patcher_pl.errors import RunInterrupted
from patcher_pl.hypergradients import (
    Adjoint,
    FirstOrder,
    Truncated,
    Unrolled,
)
from patcher_pl.hypergradients.trajectories import GradientLog
from patcher_pl.losses import differentiable_loss
from patcher_pl.models import LanguageModel, Lora, Weights
from patcher_pl.optim import SGD, AdamW
from tests.estimator_table import HIGHER_ORDER
from tests.numerics.hypergradients.problems import distance
from tests.numerics.test_patcher_retention import divergence
from tests.numerics.test_tar_update import negative_entropy
from tests.tiny_runs import (
    MemoryLogger,
    Rows,
    adamw,
    assert_same,
    fit,
    load,
    make_llama_exact,
    sgd,
)
from tests.tiny_runs import snapshot as weights_of

ATTACKER = FineTuningAttacker(num_steps=2, optimizer=SGD(lr=0.3), max_grad_norm=None)


def make(path, hypergradient=None, **options):
    settings = {"attacker": ATTACKER, "optimizer": adamw(), "refresh_every": 1, "num_sft_steps": 1}
    model = LanguageModel(path=str(path), dtype=options.pop("dtype", "float32"))
    return Patcher(model, hypergradient=hypergradient, **{**settings, **options})


@pytest.mark.parametrize("estimator", HIGHER_ORDER.values(), ids=HIGHER_ORDER)
def test_every_estimator_trains(estimator, llama, rows):
    logger = MemoryLogger()
    defense = make(llama, estimator, trust_every=1, attacker=FineTuningAttacker(
        num_steps=2, optimizer=AdamW(lr=1e-3)
    ))  # fmt: skip
    fit(defense, rows.module(), 3, logger=logger)
    first_order = make(llama)
    fit(first_order, rows.module(), 3)
    assert all(bool(value.isfinite().all()) for value in weights_of(defense.model).values())
    changed = weights_of(first_order.model)
    assert any(not torch.equal(v, changed[k]) for k, v in weights_of(defense.model).items())
    assert sorted(logger.history["hypergradient/predicted_change"]) == [2, 3]
    assert sorted(logger.history["attack/vector_norm"]) == [1, 2]
    assert all(math.isfinite(v) for v in logger.history["hypergradient/actual_change"].values())
    assert defense.cost.gradient_evaluations > 3 + 2 * 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_update_is_gradient_descent_on_the_two_losses(llama, rows, monkeypatch, accumulate):
    """One step by hand: alpha d L(theta_K(theta)) + (1 - alpha) d L(theta), over all batches."""
    make_llama_exact(monkeypatch)
    defense = make(
        *(llama, Adjoint()),
        dtype="float64",
        optimizer=sgd(0.1),
        alpha=0.3,
        num_sft_steps=0,
        max_grad_norm=None,
        accumulate_grad_batches=accumulate,
    )
    fit(defense, rows.module(), 1)
    model = load(llama, dtype="float64").train()
    inner = ATTACKER.inner_problem(rows.batches("attack", defense.tokenizer))
    safe = list(islice(rows.batches("safe", defense.tokenizer), accumulate))

    def loss(module):
        return sum(differentiable_loss(module, batch) for batch in safe) / accumulate

    attacked = Unrolled().estimate(model, Weights(model), inner, loss).gradients
    plain = torch.autograd.grad(loss(model), list(model.parameters()))
    expected = [
        p.detach() - 0.1 * (0.3 * a + 0.7 * b)
        for p, a, b in zip(model.parameters(), attacked, plain, strict=True)
    ]
    found = [p.detach() for p in defense.model.parameters()]
    assert distance(found, expected) < 1e-12
    assert distance([p.detach() for p in model.parameters()], expected) > 1e-4


def test_the_outer_loss_may_be_any_sum(llama, rows, tmp_path, monkeypatch):
    """One step by hand: entropy on data of its own, and a distance to the base model, after the attack."""
    make_llama_exact(monkeypatch)
    held_out, benign = (Rows(tmp_path / name, num_safe=5) for name in ("held-out", "benign"))
    defense = make(
        *(llama, Adjoint()),
        dtype="float64",
        optimizer=sgd(0.1),
        alpha=0.3,
        num_sft_steps=0,
        max_grad_norm=None,
        outer=NegativeEntropy(data=held_out.mixtures["safe"]),
        retain=KLToBase(data=benign.mixtures["safe"], weight=0.0, attacked_weight=0.4),
    )
    fit(defense, rows.module(), 1)
    model, base = (load(llama, dtype="float64").train() for _ in range(2))
    inner = ATTACKER.inner_problem(rows.batches("attack", defense.tokenizer))
    safe, held, kept = (
        next(r.batches("safe", defense.tokenizer)) for r in (rows, held_out, benign)
    )

    def loss(module):
        return 0.3 * negative_entropy(module, held) + 0.4 * divergence(module, base, kept)

    attacked = Unrolled().estimate(model, Weights(model), inner, loss).gradients
    plain = torch.autograd.grad(differentiable_loss(model, safe), list(model.parameters()))
    expected = [
        p.detach() - 0.1 * (a + 0.7 * b)
        for p, a, b in zip(model.parameters(), attacked, plain, strict=True)
    ]
    assert distance([p.detach() for p in defense.model.parameters()], expected) < 1e-12
    # Two attack steps there, two products back, and three losses.
    assert defense.cost.gradient_evaluations >= 2 + 2 * 2 + 3


@pytest.mark.parametrize("refresh_every", [1, 3])
def test_first_order_is_the_paper_bit_for_bit(llama, rows, refresh_every):
    runs = []
    for estimator in (None, FirstOrder()):
        defense = make(llama, estimator, refresh_every=refresh_every)
        fit(defense, rows.module(), 4)
        runs.append(weights_of(defense.model))
    assert_same(*runs)


def test_in_between_the_vector_of_the_last_estimate_is_used(llama, rows):
    """With no step differentiated, an estimator is first-order: also where it refreshes rarely."""
    runs = []
    for estimator in (None, Truncated(last_steps=0)):
        defense = make(llama, estimator, refresh_every=2, optimizer=sgd())
        fit(defense, rows.module(), 5)
        runs.append(list(weights_of(defense.model).values()))
    assert distance(runs[1], runs[0]) < 1e-6


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"attacker": FineTuningAttacker(num_steps=1, optimizer=SGD(lr=1), lora=Lora())}, "attacker"),
        ({"trust_every": 0}, "trust_every"),
        ({"hypergradient": None, "trust_every": 1}, "trust_every"),
    ],
)  # fmt: skip
def test_what_cannot_be_differentiated_is_refused(llama, options, field):
    with pytest.raises(ValueError, match=rf"^Patcher\.{field} must be .*, got .*\. .*\.$"):
        make(llama, **{"hypergradient": Adjoint(), **options})


def test_a_model_with_adapters_is_refused(llama):
    with pytest.raises(ValueError, match=r"^Patcher\.language_model\.lora must be null"):
        Patcher(LanguageModel(path=str(llama), lora=Lora()), ATTACKER, hypergradient=Adjoint())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_called_off_leaves_no_traces(llama, rows, accumulate):
    """Stopped on the way back of the step's last batch: the next run sees the same batches."""

    class Stopped(Patcher):
        calls = 0

        def check_for_stop(self):
            self.calls += 1
            self.stop_requested = self.calls > 4 * accumulate - 1
            super().check_for_stop()

    model = LanguageModel(path=str(llama))
    defense = Stopped(
        *(model, ATTACKER),
        optimizer=adamw(),
        num_sft_steps=0,
        refresh_every=1,
        hypergradient=Adjoint(store=GradientLog()),
        accumulate_grad_batches=accumulate,
    )
    data = rows.module()
    with pytest.raises(RunInterrupted):
        fit(defense, data, 2)
    assert defense.is_between_steps
    assert data.attack_stream().position == 0
    assert data.train_dataloader().position == 0
    assert all(parameter.grad is None for parameter in defense.model.parameters())
    assert_same(weights_of(defense.model), load(llama).state_dict())

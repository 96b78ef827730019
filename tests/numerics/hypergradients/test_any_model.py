"""If these fail, estimators are exact for one model in one mode only, or leave traces behind."""

import pytest
import torch

from patcher_pl.hypergradients import (
    Adjoint,
    FirstOrder,
    HypergradientError,
    Implicit,
    Truncated,
    Unrolled,
    measure_trust,
)
from patcher_pl.hypergradients.hvp import FiniteDifference, ReverseOverForward, ReverseOverReverse
from patcher_pl.hypergradients.hvp.base import HessianProduct
from patcher_pl.hypergradients.trajectories import GradientLog, Revolve
from patcher_pl.hypergradients.trajectories.revolve import split
from patcher_pl.models import Weights
from tests.estimator_table import HIGHER_ORDER, TABLE
from tests.families import FAMILIES, build_family
from tests.numerics.hypergradients.problems import (
    OPTIMIZERS,
    Quadratic,
    attack,
    distance,
    distance_to_origin,
    make_llama,
    outer_loss,
    quadratic_attack,
)
from tests.tiny_runs import load

EACH = pytest.mark.parametrize("estimator", TABLE.values(), ids=TABLE)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_their_default_attention(family, tmp_path):
    model = load(build_family(family, tmp_path), dtype="float64").eval()
    weights, inner = Weights(model), attack(OPTIMIZERS["adamw"], 2)
    found = Adjoint().estimate(model, weights, inner, outer_loss)
    expected = Unrolled().estimate(model, weights, inner, outer_loss)
    first_order = FirstOrder().estimate(model, weights, inner, outer_loss)
    # Not in true float64: Hugging Face computes norms in float32.
    assert distance(found.gradients, expected.gradients) < 1e-5
    assert distance(found.gradients, first_order.gradients) > 1e-2


@pytest.mark.parametrize(
    ("remat", "store"), [(True, Revolve(num_checkpoints=2)), (False, GradientLog())]
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_dropout_falls_the_same_way_on_the_way_back(family, remat, store, tmp_path):
    """In embeddings, residuals and attention; the generators go on as after the attack alone."""
    model = load(build_family(family, tmp_path), dtype="float64").train()
    if family == "llama":
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
    weights, inner = Weights(model), attack(OPTIMIZERS["sgd"], 4)
    drawn, found = [], []
    hvp = ReverseOverForward(rematerialize=remat)
    for estimator in (FirstOrder(), Unrolled(), Adjoint(hvp=hvp, store=store)):
        torch.manual_seed(3)
        found.append(estimator.estimate(model, weights, inner, outer_loss))
        drawn.append(float(torch.rand(())))
    assert drawn[0] == drawn[1] == drawn[2]
    assert found[2].outer_loss == pytest.approx(found[1].outer_loss, rel=1e-6)
    assert distance(found[2].gradients, found[1].gradients) < 1e-6
    again = Adjoint(hvp=hvp, store=store).estimate(model, weights, inner, outer_loss)
    assert distance(again.gradients, found[1].gradients) > 1e-2, "dropout must matter"
    step = [-1e-3 * one for one in found[2].gradients]
    with weights.shifted(step):
        trust = measure_trust(model, weights, inner, outer_loss, found[2], step)
    assert trust.ratio == pytest.approx(1.0, abs=0.05)


@EACH
def test_recomputing_activations_changes_nothing(estimator):
    """Hugging Face's own: recomputation reads the weights again, which the attack moves about."""
    found = []
    for recompute in (False, True):
        model = make_llama().train()
        if recompute:
            model.activation_checkpointing_enable()
        inner = attack(OPTIMIZERS["adamw"], 2)
        found.append(estimator.estimate(model, Weights(model), inner, outer_loss))
        assert model.is_gradient_checkpointing == recompute
    assert distance(found[1].gradients, found[0].gradients) < 1e-6


@EACH
def test_no_traces_are_left(estimator):
    model = make_llama(torch.float32).train()
    weights = Weights(model)
    frozen, held = model.lm_head.weight, model.model.norm.weight
    frozen.requires_grad_(False)
    held.grad = torch.ones_like(held)
    before = weights.snapshot()
    parameters = dict(model.named_parameters())
    estimator.estimate(model, weights, attack(OPTIMIZERS["sgd"], 2), outer_loss)
    assert all(torch.equal(a, b) for a, b in zip(weights.snapshot(), before, strict=True))
    assert all(model.get_parameter(name) is p for name, p in parameters.items())
    assert not frozen.requires_grad
    assert held.requires_grad
    assert torch.equal(held.grad, torch.ones_like(held))
    assert sum(p.grad is not None for p in parameters.values()) == 1
    assert all("forward" not in vars(module) for module in model.modules())


@EACH
def test_an_estimate_can_be_called_off(estimator):
    model = make_llama(torch.float32)
    weights = Weights(model)
    before, calls = weights.snapshot(), iter(range(2))

    def stop():
        if next(calls, None) is None:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        estimator.estimate(model, weights, attack(OPTIMIZERS["sgd"], 4), outer_loss, stop)
    assert all(torch.equal(a, b) for a, b in zip(weights.snapshot(), before, strict=True))


@pytest.mark.parametrize("estimator", HIGHER_ORDER.values(), ids=HIGHER_ORDER)
def test_half_precision_is_refused(estimator):
    model = make_llama(torch.bfloat16)
    with pytest.raises(HypergradientError, match="needs weights in float32 or float64, got"):
        estimator.estimate(model, Weights(model), attack(OPTIMIZERS["sgd"], 1), outer_loss)


@EACH
def test_autocast_is_not_let_in(estimator):
    model = make_llama(torch.float32)
    weights, inner = Weights(model), attack(OPTIMIZERS["adamw"], 2)
    plain = estimator.estimate(model, weights, inner, outer_loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = estimator.estimate(model, weights, inner, outer_loss)
    assert distance(mixed.gradients, plain.gradients) == 0


class Spoiled(HessianProduct):
    """Right, but not finite at the `at`-th product."""

    def __init__(self, at: int) -> None:
        self.left = at

    def gradient_evaluations(self, model):
        return 3.0

    def product(self, model, parameters, loss, vector, gradients):
        found = ReverseOverReverse().product(model, parameters, loss, vector, gradients)
        self.left -= 1
        if self.left == 0:
            found[0][0] = float("nan")
        return found


def spoiled(**settings):
    model = Quadratic()
    inner = quadratic_attack(model, OPTIMIZERS["sgd"], 5)
    estimator = Adjoint(hvp=Spoiled(at=2), **settings)
    return estimator.estimate(model, Weights(model), inner, distance_to_origin)


def test_a_step_that_is_not_finite_is_named():
    with pytest.raises(HypergradientError, match=r"not finite at attack step 4 of 5 .*Lower"):
        spoiled()


def test_a_walk_that_is_not_finite_can_be_truncated():
    model = Quadratic()
    inner = quadratic_attack(model, OPTIMIZERS["sgd"], 5)
    expected = Truncated(last_steps=1).estimate(model, Weights(model), inner, distance_to_origin)
    found = spoiled(non_finite="truncate")
    assert distance(found.gradients, expected.gradients) == 0
    assert found.diagnostics["truncated_at_step"] == 3.0


def test_entries_that_are_not_finite_can_be_clipped():
    found = spoiled(non_finite="clip")
    assert bool(found.gradients[0].isfinite().all())
    assert found.diagnostics["num_clipped_adjoints"] == 1.0


def test_adjoints_can_be_limited():
    model = Quadratic()
    model.A = -model.A
    weights, inner = Weights(model), quadratic_attack(model, OPTIMIZERS["sgd"], 5)
    free = Adjoint().estimate(model, weights, inner, distance_to_origin)
    assert free.diagnostics["adjoint_growth"] > 1.1
    limited = Adjoint(max_adjoint_growth=1.0).estimate(model, weights, inner, distance_to_origin)
    outer = FirstOrder().estimate(model, weights, inner, distance_to_origin).gradients[0]
    assert float(limited.gradients[0].norm()) == pytest.approx(float(outer.norm()))
    assert limited.diagnostics["num_clipped_adjoints"] > 0


@pytest.mark.parametrize("num_checkpoints", [1, 2, 3, 5])
def test_revolve_repeats_as_few_steps_as_possible(num_checkpoints):
    """Against dynamic programming over all places for the next state."""
    best: dict[tuple[int, int], int] = {}

    def fewest(steps, free):
        if steps == 1 or free == 0:
            return steps * (steps - 1) // 2
        key = (steps, free)
        if key not in best:
            best[key] = min(
                go + fewest(steps - go, free - 1) + fewest(go, free) for go in range(1, steps)
            )
        return best[key]

    def ours(steps, free):
        if steps == 1 or free == 0:
            return steps * (steps - 1) // 2
        go = split(steps, free)
        return go + ours(steps - go, free - 1) + ours(go, free)

    for steps in range(1, 40):
        assert ours(steps, num_checkpoints - 1) == fewest(steps, num_checkpoints - 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Truncated(last_steps=-1), r"Truncated\.last_steps must be >= 0, got -1\. Use"),
        (lambda: Adjoint(max_adjoint_growth=0.0), r"Adjoint\.max_adjoint_growth must .* got 0\.0"),
        (lambda: Adjoint(non_finite="hide"), r"Adjoint\.non_finite must be .* got 'hide'"),
        (lambda: Unrolled(backend="jax"), r"Unrolled\.backend must be .* got 'jax'"),
        (lambda: Implicit(strength=0.0), r"Implicit\.strength must be .* got 0\.0"),
        (lambda: Implicit(num_batches=0), r"Implicit\.num_batches must be .* got 0"),
        (lambda: Revolve(num_checkpoints=0), r"Revolve\.num_checkpoints must be .* got 0"),
        (lambda: GradientLog(device="tape"), r"GradientLog\.device must be .* got 'tape'"),
        (lambda: FiniteDifference(rel_step=0.0), r"FiniteDifference\.rel_step must .* got 0\.0"),
        (lambda: FiniteDifference(scheme="both"), r"FiniteDifference\.scheme must .* got 'both'"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

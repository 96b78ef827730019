"""If these fail, an estimator that calls itself exact is not, or an approximation is none.

The reference is one graph through the whole attack, in true float64 and on a Llama of two layers with
its default attention. Clipping is active, the padding token occurs in the text, some embedding rows are
never seen and one parameter has no gradient at all.
"""

from functools import cache

import pytest
import torch

from patcher_pl.hypergradients import Adjoint, FirstOrder, Truncated, Unrolled
from patcher_pl.hypergradients.hvp import (
    FiniteDifference,
    ForwardOverReverse,
    ReverseOverForward,
    ReverseOverReverse,
)
from patcher_pl.hypergradients.trajectories import (
    FullState,
    GradientLog,
    Revolve,
    SqrtCheckpoint,
)
from patcher_pl.models import Weights
from patcher_pl.optim import AdamW
from tests.numerics.hypergradients.problems import (
    CLIP,
    OPTIMIZERS,
    attack,
    distance,
    make_llama,
    outer_loss,
)
from tests.tiny_runs import make_llama_exact

EXACT = {
    "reverse-over-forward": ReverseOverForward(rematerialize=False),
    "rematerialized": ReverseOverForward(rematerialize=True),
    "reverse-over-reverse": ReverseOverReverse(),
    "forward-over-reverse": ForwardOverReverse(),
}
STORES = {
    "full-state": FullState(),
    "gradient-log": GradientLog(),
    "gradient-log-on-disk": GradientLog(device="disk"),
    "sqrt": SqrtCheckpoint(device="cpu"),
    "sqrt-on-disk": SqrtCheckpoint(device="disk"),
    "revolve-1": Revolve(num_checkpoints=1),
    "revolve-3": Revolve(num_checkpoints=3),
}
EACH_OPTIMIZER = pytest.mark.parametrize("name", OPTIMIZERS)
EACH_LENGTH = pytest.mark.parametrize("num_steps", [1, 4, 16])


@pytest.fixture(autouse=True)
def exact_llama(monkeypatch):
    make_llama_exact(monkeypatch)


def estimate(estimator, name, num_steps, dtype=torch.float64):
    model = make_llama(dtype)
    return estimator.estimate(
        model, Weights(model), attack(OPTIMIZERS[name], num_steps), outer_loss
    )


@cache
def reference(name, num_steps):
    return estimate(Unrolled(), name, num_steps)


def error(estimator, name, num_steps, dtype=torch.float64):
    found = estimate(estimator, name, num_steps, dtype)
    expected = reference(name, num_steps)
    assert distance(found.attack_vector, expected.attack_vector) < (
        1e-11 if dtype == torch.float64 else 1e-3
    )
    assert found.outer_loss == pytest.approx(expected.outer_loss, rel=1e-5)
    return distance(found.gradients, expected.gradients)


@EACH_OPTIMIZER
def test_the_problem_is_as_hard_as_it_should_be(name):
    """Second order matters, clipping is active at every step, and there are zero gradients."""
    exact, first_order = reference(name, 16), estimate(FirstOrder(), name, 16)
    assert distance(first_order.gradients, exact.gradients) > 0.05
    model = make_llama()
    inner = attack(OPTIMIZERS[name], 1)
    loss = inner.loss_function(model, inner.batches[0])
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    gradients = [g for g in found if g is not None]
    assert len(gradients) == len(found) - 1
    assert float(torch.nn.utils.get_total_norm(gradients)) > 2 * CLIP
    assert any(bool((g == 0).all(-1).any()) for g in gradients)


@pytest.mark.parametrize(
    ("name", "num_steps"),
    [
        *((name, K) for name in ("sgd", "momentum", "adamw") for K in (1, 4, 16)),
        ("adamw-without-eps_root", 4),
        ("adamw-without-eps_root", 16),
    ],
)
@pytest.mark.parametrize("hvp", EXACT.values(), ids=EXACT)
def test_every_exact_product_is_exact(hvp, name, num_steps):
    assert error(Adjoint(hvp=hvp, store=FullState()), name, num_steps) < 1e-11


@EACH_LENGTH
@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
def test_every_store_is_exact(store, name, num_steps):
    assert error(Adjoint(hvp=ReverseOverReverse(), store=store), name, num_steps) < 1e-11


@EACH_LENGTH
@EACH_OPTIMIZER
def test_higher_agrees(name, num_steps):
    assert error(Unrolled(backend="higher"), name, num_steps) < 1e-11


@EACH_LENGTH
@pytest.mark.parametrize("store", [FullState(), SqrtCheckpoint()], ids=str)
def test_adamw_of_torch_where_it_is_well_conditioned(store, num_steps):
    """Without `eps_root`, the slope at v = 0 is 1 / eps: here 1e3, so that long attacks stay exact."""
    model = make_llama()
    optimizer = AdamW(lr=2e-3, weight_decay=0.1, eps=1e-3, eps_root=0.0)
    weights, inner = Weights(model), attack(optimizer, num_steps)
    expected = Unrolled().estimate(model, weights, inner, outer_loss).gradients
    found = [
        Adjoint(store=store).estimate(model, weights, inner, outer_loss).gradients,
        Unrolled(backend="higher").estimate(model, weights, inner, outer_loss).gradients,
    ]
    assert all(distance(one, expected) < 1e-11 for one in found)
    first_order = FirstOrder().estimate(model, weights, inner, outer_loss).gradients
    assert distance(first_order, expected) > 1e-3


@EACH_LENGTH
@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_central_differences(name, num_steps):
    estimator = Adjoint(hvp=FiniteDifference())
    assert error(estimator, name, num_steps) < 1e-7
    assert error(estimator, name, num_steps, torch.float32) < 1e-3


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_one_sided_differences(name):
    """Of first order: a shift ten times smaller, an error ten times smaller."""
    errors = [
        error(Adjoint(hvp=FiniteDifference(scheme="one_sided", rel_step=step)), name, 4)
        for step in (1e-5, 1e-6)
    ]
    assert errors[0] < 1e-2
    assert 5 < errors[0] / errors[1] < 20


@EACH_LENGTH
@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_single_precision(name, num_steps):
    assert error(Adjoint(), name, num_steps, torch.float32) < 1e-4


@EACH_OPTIMIZER
def test_truncation_goes_from_first_order_to_exact(name):
    first_order = estimate(FirstOrder(), name, 4).gradients
    assert distance(estimate(Truncated(last_steps=0), name, 4).gradients, first_order) == 0
    for last_steps in (4, 9):
        assert error(Truncated(last_steps=last_steps), name, 4) < 1e-11
    halfway = estimate(Truncated(last_steps=2), name, 4).gradients
    assert distance(halfway, first_order) > 1e-3
    assert distance(halfway, reference(name, 4).gradients) > 1e-3


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_the_derivative_of_the_whole_attack_by_differences(name):
    """Knows nothing of any derivative: attacks from both sides of theta, along one direction."""
    model = make_llama()
    weights, inner = Weights(model), attack(OPTIMIZERS[name], 4)
    generator = torch.Generator().manual_seed(5)
    direction = [
        torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in weights.parameters
    ]
    # By torch's convention nobody learns the embedding of padding: neither attacker nor defender.
    direction[weights.names.index("model.embed_tokens.weight")][0] = 0.0
    step, losses = 1e-7, []
    for sign in (1, -1):
        with weights.shifted([sign * step * one for one in direction]):
            losses.append(FirstOrder().estimate(model, weights, inner, outer_loss).outer_loss)
    numerical = (losses[0] - losses[1]) / (2 * step)
    gradients = Adjoint().estimate(model, weights, inner, outer_loss).gradients
    predicted = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    assert predicted == pytest.approx(numerical, rel=1e-6)

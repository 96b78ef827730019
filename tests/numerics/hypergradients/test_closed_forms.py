"""If these fail, estimators do not compute what their equations say, on a problem solved by hand."""

import pytest
import torch

from patcher_pl.hypergradients import (
    Adjoint,
    ConjugateGradient,
    FirstOrder,
    Implicit,
    Neumann,
    Truncated,
    Unrolled,
    measure_trust,
)
from patcher_pl.hypergradients.hvp import (
    FiniteDifference,
    ForwardOverReverse,
    ReverseOverForward,
    ReverseOverReverse,
)
from patcher_pl.models import Weights
from patcher_pl.optim import SGD
from tests.numerics.hypergradients.problems import (
    Quadratic,
    distance_to_origin,
    quadratic_attack,
)

K, LR, MOMENTUM = 5, 0.2, 0.7
EXACT = [Unrolled(), *(
    Adjoint(hvp=hvp)
    for hvp in (ReverseOverForward(), ReverseOverReverse(), ForwardOverReverse(), FiniteDifference())
)]  # fmt: skip


def estimate(estimator, optimizer, model=None):
    model = model or Quadratic()
    inner = quadratic_attack(model, optimizer, K)
    found = estimator.estimate(model, Weights(model), inner, distance_to_origin)
    attacked = model.w.detach() + found.attack_vector[0]
    assert found.outer_loss == pytest.approx(0.5 * float(attacked @ attacked), rel=1e-12)
    return found.gradients[0], attacked, model


def eye(model):
    return torch.eye(len(model.w), dtype=torch.float64)


@pytest.mark.parametrize("estimator", EXACT, ids=str)
def test_gradient_descent(estimator):
    """theta_K is linear in theta with the matrix (I - lr A)^K."""
    found, attacked, model = estimate(estimator, SGD(lr=LR))
    jacobian = torch.linalg.matrix_power(eye(model) - LR * model.A, K)
    torch.testing.assert_close(found, jacobian.T @ attacked, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("estimator", EXACT, ids=str)
def test_momentum(estimator):
    """(theta, velocity) is linear in itself; the velocity starts at 0."""
    found, attacked, model = estimate(estimator, SGD(lr=LR, momentum=MOMENTUM))
    one = eye(model)
    top = torch.cat([one - LR * model.A, -LR * MOMENTUM * one], 1)
    step = torch.cat([top, torch.cat([model.A, MOMENTUM * one], 1)])
    jacobian = torch.linalg.matrix_power(step, K)[: len(one), : len(one)]
    torch.testing.assert_close(found, jacobian.T @ attacked, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("last_steps", [0, 1, 3, 5])
def test_truncation(last_steps):
    found, attacked, model = estimate(Truncated(last_steps=last_steps), SGD(lr=LR))
    jacobian = torch.linalg.matrix_power(eye(model) - LR * model.A, last_steps)
    torch.testing.assert_close(found, jacobian.T @ attacked, rtol=1e-12, atol=1e-12)


def test_first_order_is_the_gradient_after_the_attack():
    found, attacked, _ = estimate(FirstOrder(), SGD(lr=LR))
    torch.testing.assert_close(found, attacked, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("solver", "strength"),
    [
        (ConjugateGradient(max_iterations=20, tolerance=1e-12), 0.3),
        (ConjugateGradient(max_iterations=20, tolerance=1e-12), None),
        (Neumann(num_terms=200), 6.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_batches", [1, 3])
def test_implicit(solver, strength, num_batches):
    estimator = Implicit(solver=solver, strength=strength, num_batches=num_batches)
    found, attacked, model = estimate(estimator, SGD(lr=LR))
    c = 1 / (K * LR) if strength is None else strength
    expected = torch.linalg.solve(eye(model) + model.A / c, attacked)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_terms", [1, 2, 3])
def test_neumann_is_a_partial_sum(num_terms):
    estimator = Implicit(solver=Neumann(num_terms=num_terms), strength=2.0)
    found, attacked, model = estimate(estimator, SGD(lr=LR))
    powers = [torch.linalg.matrix_power(-model.A / 2.0, j) for j in range(num_terms)]
    torch.testing.assert_close(found, sum(powers) @ attacked, rtol=1e-12, atol=1e-12)


def test_conjugate_gradients_stop_at_negative_curvature():
    model = Quadratic()
    model.A = -model.A
    found = estimate(Implicit(strength=0.01), SGD(lr=LR), model)[0]
    assert bool(found.isfinite().all())
    inner = quadratic_attack(model, SGD(lr=LR), K)
    report = Implicit(strength=0.01).estimate(model, Weights(model), inner, distance_to_origin)
    assert report.diagnostics["negative_curvature"] == 1.0


def test_trust_is_one_for_small_steps_and_second_order_beyond():
    """L_out is quadratic in theta: actual = predicted + 1/2 |J step|^2."""
    model = Quadratic()
    weights, inner = Weights(model), quadratic_attack(model, SGD(lr=LR), K)
    found = Adjoint().estimate(model, weights, inner, distance_to_origin)
    jacobian = torch.linalg.matrix_power(eye(model) - LR * model.A, K)
    step = [-0.1 * found.gradients[0]]
    with weights.shifted(step):
        trust = measure_trust(model, weights, inner, distance_to_origin, found, step)
    moved = jacobian @ step[0]
    assert trust.predicted == pytest.approx(-0.1 * float(found.gradients[0].square().sum()))
    assert trust.actual == pytest.approx(trust.predicted + 0.5 * float(moved @ moved), rel=1e-9)

"""If these fail, attackers do not step as their settings say."""

import math
from dataclasses import replace

import pytest
import torch

from patcher_pl.optim import SGD, Adafactor, AdamW

GRADIENTS = [torch.tensor([0.3, -2.0, 1e-4]), torch.tensor([-1.0, 0.5, 0.0]), torch.ones(3)]


def run(optimizer) -> torch.Tensor:
    theta = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    stepper = optimizer.build([theta])
    for gradient in GRADIENTS:
        theta.grad = gradient.double()
        stepper.step()
    return theta.detach()


def test_adamw_is_the_algorithm_of_its_paper():
    lr, (beta1, beta2), eps, decay = 0.1, (0.8, 0.95), 1e-3, 0.2
    theta = [1.0, -2.0, 0.5]
    m, v = [0.0] * 3, [0.0] * 3
    for t, gradient in enumerate(GRADIENTS, start=1):
        for i, g in enumerate(gradient.double().tolist()):
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            step = m[i] / (1 - beta1**t) / (math.sqrt(v[i] / (1 - beta2**t)) + eps)
            theta[i] -= lr * (step + decay * theta[i])
    ours = run(AdamW(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay))
    assert ours.tolist() == pytest.approx(theta, rel=1e-12)


def test_adamw_has_the_defaults_of_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    ours = AdamW(lr=1e-5).build([parameter]).defaults
    theirs = torch.optim.AdamW([parameter], lr=1e-5).defaults
    assert ours == theirs


def test_a_fused_adamw_is_the_same_algorithm():
    settings = {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.2}
    fused = AdamW(**settings, fused=True)
    assert fused.build([torch.nn.Parameter(torch.zeros(1))]).defaults["fused"] is True
    torch.testing.assert_close(run(fused), run(AdamW(**settings)), rtol=1e-6, atol=0)
    assert fused.differentiable() == AdamW(**settings).differentiable(), "has no such kernel"


def test_a_fused_adamw_has_no_eps_root():
    with pytest.raises(ValueError, match=r"AdamW\.fused must be false with an `eps_root`"):
        AdamW(lr=0.1, eps_root=1e-10, fused=True)
    AdamW(lr=0.1, eps_root=0.0, fused=True)


def test_sgd_is_the_heavy_ball_method():
    lr, momentum, decay = 0.1, 0.7, 0.2
    theta, velocity = [1.0, -2.0, 0.5], [0.0] * 3
    for gradient in GRADIENTS:
        for i, g in enumerate(gradient.double().tolist()):
            velocity[i] = momentum * velocity[i] + g + decay * theta[i]
            theta[i] -= lr * velocity[i]
    ours = run(SGD(lr=lr, momentum=momentum, weight_decay=decay))
    assert ours.tolist() == pytest.approx(theta, rel=1e-12)


def test_plain_sgd_by_default():
    expected = torch.tensor([1.0, -2.0, 0.5]) - 0.1 * sum(GRADIENTS)
    torch.testing.assert_close(run(SGD(lr=0.1)), expected.double(), rtol=1e-6, atol=0)


def test_adafactor_is_the_algorithm_of_its_paper():
    """On a matrix; torch's way: mean squares, a tiny eps only against division by zero."""
    lr, decay, threshold, forget = 0.05, 0.2, 1.5, -0.7
    theta = [[1.0, -2.0, 0.5], [0.3, 0.1, -4.0]]
    gradients = [[[0.3, -2.0, 1e-2], [1.0, 0.2, 3.0]], [[-1.0, 0.5, 0.1], [-5.0, 0.0, 1.0]]]
    row, column = [0.0, 0.0], [0.0, 0.0, 0.0]
    for t, g in enumerate(gradients, start=1):
        keep = 1 - t**forget
        squares = [[x * x for x in line] for line in g]
        row = [keep * r + (1 - keep) * sum(q) / 3 for r, q in zip(row, squares, strict=True)]
        column = [
            keep * c + (1 - keep) * sum(q) / 2
            for c, q in zip(column, zip(*squares, strict=True), strict=True)
        ]
        mean = sum(row) / 2
        size = math.sqrt(sum(x * x for line in theta for x in line) / 6)
        alpha = max(1e-3, size) * min(lr, 1 / math.sqrt(t))
        u = [[g[i][j] / math.sqrt(row[i] * column[j] / mean) for j in range(3)] for i in range(2)]
        rms = math.sqrt(sum(x * x for line in u for x in line) / 6)
        scale = alpha / max(1.0, rms / threshold)
        theta = [
            [theta[i][j] * (1 - lr * decay) - scale * u[i][j] for j in range(3)] for i in range(2)
        ]
    parameter = torch.nn.Parameter(
        torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, -4.0]], dtype=torch.float64)
    )
    settings = Adafactor(lr=lr, beta2_decay=forget, clip_threshold=threshold, weight_decay=decay)
    stepper = settings.build([parameter])
    for g in gradients:
        parameter.grad = torch.tensor(g, dtype=torch.float64)
        stepper.step()
    torch.testing.assert_close(
        parameter.detach(), torch.tensor(theta, dtype=torch.float64), rtol=1e-10, atol=0
    )


def test_adafactor_remembers_rows_and_columns_only():
    """Its reason to be: an attacker's moments of the size of the model would not fit."""
    parameter = torch.nn.Parameter(torch.ones(30, 50))
    stepper = Adafactor(lr=1e-2).build([parameter])
    parameter.grad = torch.ones(30, 50)
    stepper.step()
    state = [value for value in stepper.state[parameter].values() if value.numel() > 1]
    assert sum(value.numel() for value in state) == 30 + 50


def test_adafactor_says_that_it_cannot_be_differentiated():
    """Wrong if an exact hypergradient were taken of another attack than the one that is run."""
    from patcher_pl.attackers import FineTuningAttacker

    optimizer = Adafactor(lr=1e-2)
    attacker = FineTuningAttacker(num_steps=2, optimizer=optimizer)
    assert not attacker.is_differentiable
    assert replace(attacker, optimizer=AdamW(lr=1e-2)).is_differentiable
    with pytest.raises(ValueError, match=r"must be AdamW or SGD .+, got Adafactor.+\. Use "):
        attacker.inner_problem(iter([{}, {}]))


@pytest.mark.parametrize("optimizer", [SGD(lr=0.1, momentum=0.9), AdamW(lr=0.1), Adafactor(lr=0.1)])
def test_every_build_starts_fresh(optimizer):
    assert torch.equal(run(optimizer), run(optimizer))


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (AdamW, "lr", 0.0),
        (AdamW, "lr", -1.0),
        (AdamW, "lr", math.nan),
        (AdamW, "betas", (0.9, 1.0)),
        (AdamW, "betas", (-0.1, 0.9)),
        (AdamW, "eps", 0.0),
        (AdamW, "weight_decay", -0.1),
        (SGD, "lr", 0.0),
        (SGD, "momentum", 1.0),
        (SGD, "weight_decay", -0.1),
        (Adafactor, "lr", 0.0),
        (Adafactor, "beta2_decay", 0.1),
        (Adafactor, "clip_threshold", 0.5),
        (Adafactor, "weight_decay", -0.1),
    ],
)
def test_bad_settings_are_refused(make, field, value):
    with pytest.raises(
        ValueError, match=rf"^{make.__name__}\.{field} must be .+, got .+\. .+\.$"
    ) as caught:
        make(**{"lr": 0.1, field: value})
    assert f"got {value}." in str(caught.value)

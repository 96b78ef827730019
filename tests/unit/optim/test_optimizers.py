"""If these fail, attackers do not step as their settings say."""

import math

import pytest
import torch

from patcher_pl.optim import SGD, AdamW

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


@pytest.mark.parametrize("optimizer", [SGD(lr=0.1, momentum=0.9), AdamW(lr=0.1)])
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
    ],
)
def test_bad_settings_are_refused(make, field, value):
    with pytest.raises(
        ValueError, match=rf"^{make.__name__}\.{field} must be .+, got .+\. .+\.$"
    ) as caught:
        make(**{"lr": 0.1, field: value})
    assert f"got {value}." in str(caught.value)

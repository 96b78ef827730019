"""If these fail, the loop in which every attack takes its steps is wrong."""

import itertools
import math

import pytest
import torch
from torch import nn

from patcher_pl.attackers import finetune
from patcher_pl.optim import SGD, AdamW

BATCH = {
    "input_ids": torch.ones(2, 3, dtype=torch.long),
    "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    "labels": torch.ones(2, 3, dtype=torch.long),
}


class Line(nn.Module):
    """Its loss falls by `slope` per unit of `weight`; `spectator` has no part in it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.spectator = nn.Parameter(torch.ones(1, dtype=torch.float64))


SLOPE = torch.tensor([3.0, 4.0], dtype=torch.float64)


def linear_loss(model, batch):
    return -(SLOPE * model.weight).sum()


def run(model, parameters, **options):
    settings = {"optimizer": SGD(lr=0.1), "num_steps": 4, "loss_function": linear_loss, **options}
    return list(finetune(model, parameters, itertools.repeat(BATCH), **settings))


def moves(**options) -> list[float]:
    """How far each step went along the (constant) gradient, in units of lr times its norm."""
    model = Line()
    seen = [torch.zeros(2, dtype=torch.float64)]
    settings = {"optimizer": SGD(lr=0.1), "num_steps": 4, "loss_function": linear_loss, **options}
    for _ in finetune(model, [model.weight], itertools.repeat(BATCH), **settings):
        seen.append(model.weight.detach().clone())
    return [float((b - a).norm()) / 0.5 for a, b in itertools.pairwise(seen)]


def test_steps_of_gradient_descent():
    model = Line()
    steps = run(model, [model.weight])
    torch.testing.assert_close(model.weight.detach(), 4 * 0.1 * SLOPE)
    assert [step.index for step in steps] == [1, 2, 3, 4]
    assert [step.loss for step in steps] == pytest.approx([0.0, -2.5, -5.0, -7.5])
    assert [step.grad_norm for step in steps] == pytest.approx([5.0] * 4)
    assert [step.num_tokens for step in steps] == [5] * 4


def test_clipping_shortens_the_step_but_not_the_logged_norm():
    assert moves(max_grad_norm=1.0) == pytest.approx([0.2] * 4, rel=1e-5)
    assert moves(max_grad_norm=100.0) == pytest.approx([1.0] * 4)
    model = Line()
    assert run(model, [model.weight], max_grad_norm=1.0)[0].grad_norm == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("schedule", "num_warmup_steps", "rates"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 2, [0, 0.5, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("linear", 2, [0, 0.5, 1, 0.5]),
        ("cosine", 0, [(1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)]),
    ],
)
def test_schedules(schedule, num_warmup_steps, rates):
    assert moves(schedule=schedule, num_warmup_steps=num_warmup_steps) == pytest.approx(rates)


def test_only_what_is_given_is_trained_and_no_gradient_is_left():
    model = Line()
    run(model, [model.weight, model.spectator], optimizer=SGD(lr=0.1))
    assert model.spectator.item() == 1.0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_of_a_step_do_not_reach_the_next():
    """Neither those of a caller: the first step is that of a clean start."""
    model = Line()
    model.weight.grad = torch.full((2,), 100.0, dtype=torch.float64)
    run(model, [model.weight], num_steps=1)
    torch.testing.assert_close(model.weight.detach(), 0.1 * SLOPE)


def test_the_model_may_be_looked_at_between_two_steps():
    """Steps are taken one by one as they are asked for."""
    model = Line()
    steps = finetune(
        model,
        [model.weight],
        itertools.repeat(BATCH),
        optimizer=AdamW(lr=0.1),
        num_steps=2,
        loss_function=linear_loss,
    )
    assert float(model.weight.detach().norm()) == 0
    next(steps)
    once = model.weight.detach().clone()
    assert float(once.norm()) > 0
    next(steps)
    assert not torch.equal(model.weight, once)
    assert next(steps, None) is None


def test_no_step_takes_no_batch():
    model = Line()
    assert list(finetune(model, [model.weight], iter([]), optimizer=SGD(lr=1), num_steps=0)) == []

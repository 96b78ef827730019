"""If these fail, attacks are not stepped, or not differentiated, as torch's optimizers step."""

import copy
import dataclasses
import math

import pytest
import torch
from transformers import get_scheduler

from patcher_pl.optim import SGD, AdamW, ClipByGlobalNorm, Update, lr_factor

OPTIMIZERS = {
    "sgd": SGD(lr=0.1),
    "sgd-decay": SGD(lr=0.1, weight_decay=0.2),
    "momentum": SGD(lr=0.1, momentum=0.9, weight_decay=0.05),
    "adamw": AdamW(lr=0.1, weight_decay=0.1),
    "adamw-odd": AdamW(lr=0.03, betas=(0.5, 0.7), eps=1e-3),
}
EACH = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
SHAPES = [(3, 4), (5,), (2, 2)]
NUM_STEPS = 6


def draw(seed: int, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def gradients_of(step: int, dtype=torch.float64) -> list[torch.Tensor | None]:
    """The second tensor has a zero row at all times; the third gets no gradient now and then."""
    first, second, third = draw(100 + step, dtype)
    first[1] = 0.0
    return [first, second, None if step % 3 == 1 else third]


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_steps_are_those_of_torch_to_the_last_bit(optimizer, dtype, clip):
    ours, theirs = draw(0, dtype), [torch.nn.Parameter(p) for p in draw(0, dtype)]
    update = Update(
        optimizer=optimizer,
        num_steps=NUM_STEPS,
        clip=None if clip is None else ClipByGlobalNorm(max_norm=clip),
        schedule="cosine",
        num_warmup_steps=2,
    )
    state, stepper = optimizer.init(ours), optimizer.build(theirs)
    scheduler = get_scheduler("cosine", stepper, num_warmup_steps=2, num_training_steps=NUM_STEPS)
    for step in range(NUM_STEPS):
        for parameter, gradient in zip(theirs, gradients_of(step, dtype), strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(theirs, math.inf if clip is None else clip)
        stepper.step()
        scheduler.step()
        update.step_(ours, gradients_of(step, dtype), state, step)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=0, atol=0)


def graph(update, start, gradients):
    theta, state = start, update.optimizer.init(start)
    for step, given in enumerate(gradients):
        theta, state = update.applied(theta, given, state, step)
    return theta


@EACH
@pytest.mark.parametrize("eps_root", [0.0, 1e-10, 1e-2])
@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_vjp_is_the_derivative_of_the_step(optimizer, eps_root, clip):
    """Through several steps, by the start and by every gradient, against autograd."""
    if isinstance(optimizer, AdamW):
        optimizer = dataclasses.replace(optimizer, eps_root=eps_root)
    elif eps_root:
        pytest.skip("no second moment")
    update = Update(
        optimizer=optimizer,
        num_steps=NUM_STEPS,
        clip=None if clip is None else ClipByGlobalNorm(max_norm=clip),
        schedule="linear",
    )
    start = [p.requires_grad_() for p in draw(0)]
    gradients = [gradients_of(step) for step in range(NUM_STEPS)]
    leaves = [g.requires_grad_() for given in gradients for g in given if g is not None]
    end = graph(update, start, gradients)
    seeds = draw(7)
    expected = torch.autograd.grad(end, [*start, *leaves], seeds)

    states, theta, state = [], [p.detach().clone() for p in start], optimizer.init(start)
    for step, given in enumerate(gradients):
        states.append(copy.deepcopy(state))
        update.step_(theta, [g if g is None else g.detach() for g in given], state, step)
    for a, b in zip(theta, end, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-13, atol=1e-13)
    cotangent = optimizer.init_cotangent([s.clone() for s in seeds])
    pulled: list[torch.Tensor] = []
    for step in reversed(range(NUM_STEPS)):
        given = [g if g is None else g.detach() for g in gradients[step]]
        found = update.vjp(cotangent, given, states[step], step)
        pulled = [f for f, g in zip(found, given, strict=True) if g is not None] + pulled
    for ours, theirs in zip([*cotangent.parameters, *pulled], expected, strict=True):
        assert bool(theirs.isfinite().all())
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_adamw_at_zero_has_the_slope_of_its_first_step():
    """u(g) = c g / (d |g| + eps) has slope c / eps at 0: neither NaN nor 0."""
    optimizer = AdamW(lr=1.0, eps=1e-3, weight_decay=0.0, eps_root=0.0)
    zero = [torch.zeros(1, dtype=torch.float64)]
    cotangent = optimizer.init_cotangent([torch.ones(1, dtype=torch.float64)])
    (slope,) = optimizer.vjp(cotangent, zero, optimizer.init(zero))
    assert slope.item() == pytest.approx(-1e3, rel=1e-12)
    tiny = [torch.full((1,), 1e-12, dtype=torch.float64)]
    moved = [torch.zeros(1, dtype=torch.float64)]
    optimizer.step_(moved, tiny, optimizer.init(zero))
    assert moved[0].item() / 1e-12 == pytest.approx(-1e3, rel=1e-6)


def test_eps_root_bounds_the_slope_at_zero_and_is_there_only_when_differentiated():
    plain = AdamW(lr=1.0, weight_decay=0.0)
    assert isinstance(plain.build([torch.nn.Parameter(torch.ones(1))]), torch.optim.AdamW)
    optimizer = plain.differentiable()
    assert optimizer.eps_root == 1e-10
    assert AdamW(lr=1.0, eps_root=0.0).differentiable().eps_root == 0.0
    zero = [torch.zeros(1)]
    cotangent = optimizer.init_cotangent([torch.ones(1)])
    (slope,) = optimizer.vjp(cotangent, zero, optimizer.init(zero))
    assert slope.item() == pytest.approx(-1 / (1e-5 + 1e-8), rel=1e-5)


def test_a_built_optimizer_with_eps_root_steps_by_it():
    optimizer = AdamW(lr=0.1, eps_root=0.5, weight_decay=0.1)
    ours, theirs = draw(0), [torch.nn.Parameter(p) for p in draw(0)]
    state, stepper = optimizer.init(ours), optimizer.build(theirs)
    for step in range(3):
        for parameter, gradient in zip(theirs, gradients_of(step), strict=True):
            parameter.grad = gradient
        stepper.step()
        optimizer.step_(ours, gradients_of(step), state)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("num_warmup_steps", [0, 3, 10])
def test_schedules_are_those_of_transformers(schedule, num_warmup_steps):
    stepper = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(
        name, stepper, num_warmup_steps=num_warmup_steps, num_training_steps=10
    )
    for step in range(12):
        ours = lr_factor(schedule, step=step, num_steps=10, num_warmup_steps=num_warmup_steps)
        assert ours == stepper.param_groups[0]["lr"]
        stepper.step()
        scheduler.step()


def test_clipping_to_nothing_is_refused():
    with pytest.raises(ValueError, match=r"ClipByGlobalNorm\.max_norm must be > 0, got 0"):
        ClipByGlobalNorm(max_norm=0)

"""If these fail, moments in few bytes bend attacks, or an attack cannot be repeated to the bit."""

import copy
import sys
from dataclasses import replace

import pytest
import torch

from patcher_pl.optim import SGD, AdamW, low_memory
from patcher_pl.optim.low_memory import stochastically_rounded

PLAIN = AdamW(lr=1e-3)
BFLOAT16 = replace(PLAIN, state_dtype="bfloat16")
EIGHT_BITS = replace(PLAIN, state_dtype="8bit")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def taken(optimizer, num_steps, shape=(6, 1024), dtype=torch.float32):
    """Weights and state after some steps down a noisy slope."""
    theta = [draw(shape, 1, dtype), draw((3,), 2, dtype)]
    state = optimizer.init(theta)
    for step in range(num_steps):
        gradients = [0.1 * draw(one.shape, 10 + step, dtype) + 0.02 for one in theta]
        optimizer.step_(theta, gradients, state)
    return theta, state


def test_rounding_goes_to_a_neighbor_and_is_right_on_average():
    """Wrong if a moment drifted, or moved further than one neighbor."""
    value = torch.tensor([1.0 + 0.3 / 128, -1e-20 * (1 + 0.7 / 128), 3.0, 0.0])
    drawn = stochastically_rounded(value.repeat(20000, 1), generator()).float()
    below = (value.view(torch.int32) & (-1 << 16)).view(torch.float32)
    above = ((value.view(torch.int32) & (-1 << 16)) + (1 << 16)).view(torch.float32)
    assert bool(((drawn == below) | (drawn == above)).all())
    share = (drawn == above).float().mean(0)
    # The value in units of the distance between neighbors, 5 standard errors.
    expected = torch.tensor([0.3, (value[1] - below[1]) / (above[1] - below[1]), 0.0, 0.0])
    assert share.tolist() == pytest.approx(expected.tolist(), abs=5 * 0.5 / 20000**0.5)


def test_what_is_not_finite_stays_so():
    """Wrong if a NaN with full bits, as GPUs make them, became a number."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800000, -0x800000], dtype=torch.int32)
    rounded = stochastically_rounded(bits.view(torch.float32).repeat(100, 1), generator())
    assert bool(rounded[:, :2].isnan().all())
    assert rounded[0, 2:].tolist() == [float("inf"), -float("inf")]
    assert bool(rounded[:, 2:].isinf().all())


def test_moments_in_bfloat16_follow_those_in_float32():
    """Wrong if the second moment stood still, as it does when rounded to the nearest."""
    steady = replace(PLAIN, betas=(0.9, 0.999))
    theta, gradient = [torch.zeros(4096)], [torch.full((4096,), 0.1)]
    exact, ours = steady.init(theta), BFLOAT16.init(theta)
    for _ in range(400):
        steady.step_([theta[0].clone()], gradient, exact)
        BFLOAT16.step_([theta[0].clone()], gradient, ours)
    for ours_, exact_ in zip(ours.slots, exact.slots, strict=True):
        assert ours_[0].dtype == torch.bfloat16
        assert ours_[0].float().mean().item() == pytest.approx(exact_[0].mean().item(), rel=0.01)
    nearest = torch.zeros(1, dtype=torch.bfloat16)
    for _ in range(400):
        nearest.mul_(0.999).add_(0.001 * 0.1**2)
    error = abs(nearest.item() / exact.slots[1][0][0].item() - 1)
    assert error > 0.1, "the test could not fail"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_step_is_that_of_float32(dtype):
    """What is calculated with moments is not rounded: nothing is lost before there is a state."""
    ours, theirs = taken(BFLOAT16, 1, dtype=dtype)[0], taken(PLAIN, 1, dtype=dtype)[0]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_later_steps_stay_near_those_of_float32():
    start, exact, ours = (
        taken(one, n)[0][0] for one, n in ((PLAIN, 0), (PLAIN, 40), (BFLOAT16, 40))
    )
    assert (ours - exact).norm() < 0.01 * (exact - start).norm()
    assert not torch.equal(ours, exact)


def test_an_attack_is_a_function_of_its_state():
    """Wrong if a run that goes on, or an attack that is gone back to, rounded by other bits."""
    torch.manual_seed(1)
    straight, state = taken(BFLOAT16, 7)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    theta, other = taken(BFLOAT16, 6)
    theta, other = copy.deepcopy((theta, other))
    gradients = [0.1 * draw(one.shape, 16) + 0.02 for one in theta]
    BFLOAT16.step_(theta, gradients, other)
    assert all(torch.equal(a, b) for a, b in zip(theta, straight, strict=True))
    for ours, theirs in zip(other.slots, state.slots, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(torch.get_rng_state(), before), "draws of others moved"


def test_parameters_and_steps_are_rounded_by_bits_of_their_own():
    assert len({low_memory.seed_of(index, step) for index in range(9) for step in range(9)}) == 81


def test_pieces_and_strides_change_nothing(monkeypatch):
    """Wrong if a weight that is not contiguous were changed in a copy alone, or a piece left out."""
    monkeypatch.setattr(low_memory, "_PIECE", 1000)
    expected, exact = taken(BFLOAT16, 3)[0][0], taken(PLAIN, 3)[0][0]
    theta = [draw((6, 1024), 1).t().contiguous().t(), draw((3,), 2)]
    assert not theta[0].is_contiguous()
    state = BFLOAT16.init(theta)
    for step in range(3):
        BFLOAT16.step_(theta, [0.1 * draw(one.shape, 10 + step) + 0.02 for one in theta], state)
    assert torch.equal(theta[0], expected)
    torch.testing.assert_close(theta[0], exact, rtol=0, atol=0.05 * 3 * PLAIN.lr)


def test_a_built_optimizer_takes_the_same_steps():
    theta, _ = taken(BFLOAT16, 3)
    built = [torch.nn.Parameter(draw((6, 1024), 1)), torch.nn.Parameter(draw((3,), 2))]
    stepper = BFLOAT16.build(built)
    for step in range(3):
        for one in built:
            one.grad = 0.1 * draw(one.shape, 10 + step) + 0.02
        stepper.step()
    assert all(torch.equal(a, b) for a, b in zip(built, theta, strict=True))
    assert stepper.state[built[0]]["exp_avg"].dtype == torch.bfloat16


def test_8_bits_are_those_of_torchao(monkeypatch):
    """Against torchao's own optimizer, whose steps are compiled, in pieces and whole."""
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit

    theirs = [torch.nn.Parameter(draw((6, 1024), 1)), torch.nn.Parameter(draw((3,), 2))]
    stepper = AdamW8bit(theirs, lr=EIGHT_BITS.lr, weight_decay=EIGHT_BITS.weight_decay)
    with torch.compiler.set_stance("force_eager"):
        for step in range(3):
            for one in theirs:
                one.grad = 0.1 * draw(one.shape, 10 + step) + 0.02
            stepper.step()
    whole, state = taken(EIGHT_BITS, 3)
    monkeypatch.setattr(low_memory, "_PIECE", 1024)
    in_pieces, state_of_pieces = taken(EIGHT_BITS, 3)
    for number, name in enumerate(("exp_avg", "exp_avg_sq")):
        expected, ours = stepper.state[theirs[0]][name], state.slots[number][0]
        assert isinstance(ours, OptimState8bit)
        assert isinstance(state.slots[number][1], torch.Tensor), "small ones stay in float32"
        torch.testing.assert_close(ours.scale, expected.scale, rtol=1e-5, atol=0)
        assert (ours.codes != expected.codes).float().mean() < 1e-3
        assert torch.equal(ours.codes, state_of_pieces.slots[number][0].codes)
    for ours, again, expected in zip(whole, in_pieces, theirs, strict=True):
        # A moment on the border of two codes falls to either side with the CPU's rounding, and
        # its parameter then takes another step than the rest, of at most the learning rate.
        other = (ours - expected.detach()).abs()
        assert (other > 1e-6 + 1e-5 * expected.detach().abs()).float().mean() < 2e-3
        assert other.max() < EIGHT_BITS.lr
        assert torch.equal(ours, again)


def test_8_bits_without_torchao_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim.subclass_8bit", None)
    with pytest.raises(ValueError, match=r"^AdamW\.state_dtype must be .+, got '8bit'. Install it"):
        AdamW(lr=0.1, state_dtype="8bit")


def test_what_is_rounded_cannot_be_differentiated():
    """Wrong if an exact hypergradient were taken of another attack than the one that is run."""
    message = (
        r"AdamW\.state_dtype must be null for an attack that is differentiated, got 'bfloat16'"
    )
    theta = [torch.zeros(3)]
    state = BFLOAT16.init(theta)
    for refused in (
        BFLOAT16.differentiable,
        lambda: BFLOAT16.applied(theta, theta, state),
        lambda: BFLOAT16.vjp(BFLOAT16.init_cotangent([torch.ones(3)]), theta, state),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    assert not BFLOAT16.is_differentiable
    assert PLAIN.is_differentiable and SGD(lr=0.1).is_differentiable


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"state_dtype": "float16"}, "state_dtype"),
        ({"state_dtype": "8bit", "fused": True}, "fused"),
    ],
)
def test_bad_settings_are_refused(settings, field):
    with pytest.raises(ValueError, match=rf"^AdamW\.{field} must be .+, got .+\. .+\.$"):
        AdamW(lr=0.1, **settings)

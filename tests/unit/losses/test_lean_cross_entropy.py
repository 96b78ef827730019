"""If these fail, large-vocabulary losses are off, or a second derivative is silently wrong."""

import pytest
import torch
from torch.nn import functional

from patcher_pl.losses import lean_cross_entropy as lean_loss

NUM_ROWS, VOCAB = 7, 11


@pytest.fixture(params=[1, 3 * VOCAB, 10**6], ids=["row", "some rows", "all rows"])
def chunk(request, monkeypatch):
    """Rows that are worked on at once must not matter."""
    from importlib import import_module

    module = import_module("patcher_pl.losses.lean_cross_entropy")
    monkeypatch.setattr(module, "_CHUNK_ON_CPU", request.param)


def drawn(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = 3 * torch.randn(NUM_ROWS, VOCAB, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, (NUM_ROWS,), generator=generator)
    return hidden.to(dtype).requires_grad_(), targets


def gradient(loss_function, hidden, targets, weight=0.3):
    # Times one: as in a model, the logits are nobody's leaf.
    (found,) = torch.autograd.grad(weight * loss_function(hidden * 1, targets), hidden)
    return found


@pytest.mark.usefixtures("chunk")
def test_loss_and_gradient_are_those_of_torch():
    hidden, targets = drawn()
    exact = {"rtol": 1e-13, "atol": 1e-15}
    torch.testing.assert_close(
        lean_loss(hidden * 1, targets), functional.cross_entropy(hidden, targets), **exact
    )
    torch.testing.assert_close(
        gradient(lean_loss, hidden, targets),
        gradient(functional.cross_entropy, hidden, targets),
        **exact,
    )


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_up_in_float32(dtype):
    hidden, targets = drawn(dtype)
    loss = lean_loss(hidden * 1, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, functional.cross_entropy(hidden.float(), targets))
    expected = gradient(functional.cross_entropy, hidden.float(), targets)
    found = gradient(lean_loss, hidden, targets)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.float(), expected, rtol=2 * eps, atol=eps * 1e-3)


@pytest.mark.usefixtures("chunk")
def test_without_a_gradient_the_logits_stay_as_they_are():
    hidden, targets = drawn()
    with torch.no_grad():
        logits = hidden * 1
        before = logits.clone()
        loss = lean_loss(logits, targets)
        assert torch.equal(logits, before)
    assert torch.equal(loss, lean_loss(before, targets))
    torch.testing.assert_close(loss, functional.cross_entropy(before, targets))


def test_no_second_buffer_of_logits_is_held():
    hidden, targets = drawn()
    logits = hidden * 1
    place = logits.data_ptr()
    loss = lean_loss(logits, targets)
    assert logits.grad_fn is not None
    (saved,) = loss.grad_fn.saved_tensors
    assert saved.data_ptr() == place
    assert not torch.equal(logits, hidden)


def test_second_derivatives_are_refused():
    """The graph of a model's gradient goes on above the logits, so that nothing else would say so."""
    hidden, targets = drawn()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(lean_loss(hidden * 1, targets), hidden, create_graph=True)


def test_forward_derivatives_are_refused():
    from torch.autograd import forward_ad

    hidden, targets = drawn()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(hidden * 1, torch.ones_like(hidden))
        with pytest.raises(RuntimeError, match="forward"):
            lean_loss(dual, targets)


def test_functional_derivatives_are_refused():
    hidden, targets = drawn()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda logits: lean_loss(logits * 1, targets))(hidden.detach())


def test_a_gradient_can_be_taken_once():
    """It would be multiplied by the weight of the loss twice."""
    hidden, targets = drawn()
    loss = lean_loss(hidden * 1, targets)
    torch.autograd.grad(loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, hidden)


def test_logits_that_another_backward_pass_needs_are_an_error():
    hidden, targets = drawn()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lean_loss(hidden.tanh(), targets).backward()


def test_a_certain_prediction_is_no_nan():
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = lean_loss(logits * 1, torch.tensor([0]))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(1, 3))

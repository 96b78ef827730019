"""If these fail, every loss, gradient and figure of the project is off."""

import math
from types import SimpleNamespace

import pytest
import torch

from patcher_pl.losses import answer_cross_entropy, differentiable_loss


def test_uniform_predictions_cost_log_vocab():
    labels = torch.tensor([[-100, -100, 3, 1]])
    assert float(answer_cross_entropy(torch.zeros(1, 4, 7), labels)) == pytest.approx(math.log(7))


def test_the_mean_is_over_answer_tokens_of_the_whole_batch():
    """Position t predicts token t + 1; rows with more answer tokens weigh more."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[-100, -100, 2, 5, -100], [-100, 0, 1, 4, 3]])
    likelihoods = logits.log_softmax(-1)
    terms = [
        likelihoods[row, time - 1, labels[row, time]]
        for row in range(2)
        for time in range(1, 5)
        if labels[row, time] != -100
    ]
    expected = -sum(terms) / len(terms)
    assert len(terms) == 6
    torch.testing.assert_close(answer_cross_entropy(logits, labels), expected, rtol=1e-14, atol=0)


def test_the_gradient_is_softmax_minus_one_hot():
    logits = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    answer_cross_entropy(logits, torch.tensor([[-100, -100, 2]])).backward()
    expected = torch.zeros_like(logits)
    expected[0, 1] = logits[0, 1].softmax(-1) - torch.eye(4, dtype=torch.float64)[2]
    torch.testing.assert_close(logits.grad, expected.detach(), rtol=1e-14, atol=1e-16)


def test_a_label_on_the_first_token_does_not_count():
    """Nothing predicts it."""
    logits = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    first, without = torch.tensor([[1, 2, -100]]), torch.tensor([[-100, 2, -100]])
    assert answer_cross_entropy(logits, first) == answer_cross_entropy(logits, without)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_up_in_float32(dtype):
    logits = torch.randn(2, 9, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    loss = answer_cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, answer_cross_entropy(logits.float(), labels))


@pytest.mark.parametrize("labels", [[[-100, -100]], [[1, -100]]])
def test_a_batch_without_an_answer_is_refused(labels):
    """Its mean is 0 / 0, which would turn every weight into NaN."""
    with pytest.raises(ValueError, match="at least one answer token, got none"):
        answer_cross_entropy(torch.zeros(1, 2, 3), torch.tensor(labels))


def test_the_model_gets_ids_and_mask_and_no_labels():
    """Its own loss would count padding and prompt as it likes."""
    seen = {}

    class Model(torch.nn.Module):
        def forward(self, **inputs):
            seen.update(inputs)
            return SimpleNamespace(logits=torch.zeros(1, 2, 3))

    batch = {
        "input_ids": torch.tensor([[1, 2]]),
        "attention_mask": torch.tensor([[1, 1]]),
        "labels": torch.tensor([[-100, 2]]),
    }
    assert float(differentiable_loss(Model(), batch)) == pytest.approx(math.log(3))
    assert seen.keys() == {"input_ids", "attention_mask", "use_cache"}
    assert seen["use_cache"] is False

"""If these fail, how far a model has moved is measured in the wrong places or too coarsely."""

import math

import pytest
import torch

from patcher_pl.losses.retained import (
    answer_log_likelihoods,
    mean_divergence,
    mean_state_distance,
    predicts_answers,
)

LABELS = torch.tensor([[-100, -100, 3, 1], [-100, 2, -100, -100]])
PREDICTING = [[False, True, True, False], [True, False, False, False]]


def test_an_answer_token_is_predicted_one_position_before():
    assert predicts_answers(LABELS).tolist() == PREDICTING
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([logits[0, 1], logits[0, 2], logits[1, 0]]).log_softmax(-1)
    assert torch.equal(answer_log_likelihoods(logits, LABELS), expected)


def test_where_all_tokens_are_answers_all_but_the_last_position_count():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    expected = logits[:, :-1].log_softmax(-1).flatten(0, 1)
    assert torch.equal(answer_log_likelihoods(logits, torch.ones(2, 3).long()), expected)


def test_half_precision_is_raised_first():
    found = answer_log_likelihoods(torch.zeros(2, 4, 5, dtype=torch.bfloat16), LABELS)
    assert found.dtype == torch.float32


def test_the_divergence_is_that_of_p_from_q():
    """Not the reverse one, which is another number; 0 where both are the same."""
    p, q = torch.tensor([[0.5, 0.5], [0.8, 0.2]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    rows = 0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    expected = sum(rows) / 2
    assert float(mean_divergence(p.log(), q.log())) == pytest.approx(expected, rel=1e-6)
    assert float(mean_divergence(q.log(), q.log())) == 0


def test_the_distance_is_the_mean_over_tokens_and_layers():
    first, second = torch.zeros(2, 4, 2), torch.zeros(2, 4, 2)
    first[0, 1] = torch.tensor([3.0, 4.0])
    second[1, 0] = torch.tensor([0.0, 2.0])
    first[1, 3] = 100.0  # Predicts nothing.
    kept = [torch.zeros(2, 4, 2)] * 2
    found = mean_state_distance([first, second], kept, torch.tensor(PREDICTING))
    assert float(found) == pytest.approx((5 / 3 + 2 / 3) / 2)

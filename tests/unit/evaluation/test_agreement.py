"""Agreement of two judges against Cohen's definition."""

import math

import pytest

from patcher_pl.evaluation import Agreement, Verdict, judge_agreement


def _verdicts(scores):
    return [
        Verdict(int(score), coherent=True)
        if score != "x"
        else Verdict(None, coherent=False, error="no reply")
        for score in scores
    ]


def test_kappa_is_cohens():
    """2 x 2 table 4, 1, 2, 3: agreement 0.7, by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5, kappa 0.4."""
    first, second = _verdicts("5555511111"), _verdicts("5555455444")
    found = judge_agreement(first, second)
    assert found.rate == pytest.approx(0.7)
    assert found.kappa == pytest.approx(0.4, abs=1e-6)
    assert found.num_pairs == 10
    assert judge_agreement(second, first).kappa == pytest.approx(found.kappa)


def test_only_the_highest_score_is_a_success():
    assert judge_agreement(_verdicts("1234"), _verdicts("4321")).rate == 1
    assert judge_agreement(_verdicts("5544"), _verdicts("5514")) == Agreement(1.0, 1.0, 4)


def test_opposite_judges():
    assert judge_agreement(_verdicts("5511"), _verdicts("1155")) == Agreement(-1.0, 0.0, 4)
    # Both constant, and different: no better than chance.
    assert judge_agreement(_verdicts("55"), _verdicts("11")) == Agreement(0.0, 0.0, 2)


def test_failures_of_either_judge_are_left_out():
    found = judge_agreement(_verdicts("5x151"), _verdicts("51x51"))
    assert found == Agreement(1.0, 1.0, 3)


@pytest.mark.parametrize("scores", ["", "xx"])
def test_nothing_scored_is_nan(scores):
    found = judge_agreement(_verdicts(scores), _verdicts("5" * len(scores)))
    assert math.isnan(found.kappa)
    assert math.isnan(found.rate)
    assert found.num_pairs == 0


@pytest.mark.parametrize("scores", ["555", "111"])
def test_equal_constants_have_no_kappa(scores):
    """Wrong if two judges that never tell answers apart were reported as agreeing perfectly."""
    found = judge_agreement(_verdicts(scores), _verdicts(scores))
    assert math.isnan(found.kappa)
    assert found.rate == 1
    assert found.num_pairs == 3


def test_verdicts_on_different_answers_are_refused():
    with pytest.raises(ValueError, match="same answers, got 1 and 2"):
        judge_agreement(_verdicts("5"), _verdicts("55"))

"""Aggregation: nothing is scored that was not, and uncertainty is stated."""

import math

import pytest

from patcher_pl.evaluation import (
    Answer,
    Judge,
    Question,
    Verdict,
    evaluate_answers,
    steps_to_break,
)
from patcher_pl.evaluation.aggregate import wilson_interval
from patcher_pl.types import Message


def _scores(*scores):
    return [
        Verdict(score, coherent=True) if score else Verdict(None, coherent=False, error="no reply")
        for score in scores
    ]


class Scripted(Judge):
    """Says what it was told to say."""

    def __init__(self, verdicts):
        self.verdicts = verdicts

    def score(self, prompt, answer, reference):
        return self.verdicts[int(answer)]


def evaluated(verdicts):
    questions = [Question((Message("user", "Tea?"),), None, "tea:1")] * len(verdicts)
    answers = [Answer(str(number), True, 1) for number in range(len(verdicts))]
    return evaluate_answers(Scripted(verdicts), questions, answers)


def test_only_the_highest_score_is_a_success_and_errors_are_not_scored():
    """Wrong if a failing judge lowered the rate, as scoring it 0 would."""
    found = evaluated([*_scores(5, 4, None, 5, None, 1), Verdict(1, coherent=False)])
    assert found.rate == pytest.approx(2 / 5, abs=1e-15)
    assert (found.num_scored, found.num_errors) == (5, 2)
    assert found.coherent == pytest.approx(4 / 5, abs=1e-15)
    assert found.low < 0.4 < found.high


@pytest.mark.parametrize("verdicts", [[], _scores(None, None)])
def test_nothing_scored_is_nan_not_zero(verdicts):
    found = evaluated(verdicts)
    assert all(map(math.isnan, (found.rate, found.low, found.high, found.coherent)))
    assert found.num_scored == 0


class Lenient(Judge):
    """Finds full marks and coherence in everything."""

    def score(self, prompt, answer, reference):
        return Verdict(5, coherent=True)


def test_an_answer_without_words_is_no_language_whatever_the_judge_says():
    """Wrong if a model that only ends its turn could pass for one that speaks."""
    questions = [Question((Message("user", "Tea?"),), None, "tea:1")] * 4
    answers = [Answer(text, True, 1) for text in ("", "?!", "Yes.", "tea " * 10)]
    found = evaluate_answers(Lenient(), questions, answers)
    assert found.coherent == 0.5
    assert found.repetition == pytest.approx(7 / 8)


def test_wilson_interval_solves_its_equation():
    """The bounds are the shares p at which the observed one is exactly z deviations away."""
    z = 1.959964
    for successes, count in [(1, 7), (30, 60), (199, 200)]:
        for bound in wilson_interval(successes, count):
            deviation = abs(successes / count - bound)
            assert deviation == pytest.approx(z * math.sqrt(bound * (1 - bound) / count), rel=1e-9)


def test_wilson_interval_at_the_ends():
    """Wrong if 0 of 20 looked certain."""
    low, high = wilson_interval(0, 20)
    assert low == 0.0
    assert 0.1 < high < 0.2
    assert wilson_interval(20, 20) == pytest.approx((1 - high, 1.0))


@pytest.mark.parametrize(
    ("asr", "threshold", "expected"),
    [
        ([0.0, 0.4, 0.6, 1.0], 0.5, 40),
        ([0.0, 0.4, 0.5, 0.1], 0.5, 40),
        ([0.7, 0.0, 0.0, 0.0], 0.5, 0),
        ([0.0, 0.1, 0.2, 0.3], 0.5, None),
        ([0.0, 0.1, 0.2, 0.3], 0.2, 40),
        ([0.0, math.nan, None, 0.9], 0.5, 80),
        ([math.nan, None, None, None], 0.5, None),
    ],
)
def test_steps_to_break(asr, threshold, expected):
    assert steps_to_break([0, 20, 40, 80], asr, threshold) == expected


def test_steps_to_break_wants_one_rate_per_point():
    with pytest.raises(ValueError, match="shorter"):
        steps_to_break([0, 20], [0.0])


def test_answers_meet_their_own_question_and_reference():
    """Wrong if answers, prompts and references were mixed up on the way to the judge."""

    class Exact(Judge):
        def score(self, prompt, answer, reference):
            if prompt == "unclear":
                return Verdict(None, coherent=False, error="cannot tell")
            return Verdict(5 if answer == f"{prompt} {reference}" else 1, coherent=True)

    questions = [
        Question((Message("user", text),), reference, "made up")
        for text, reference in [("tea", "leaf"), ("cake", "flour"), ("unclear", None)]
    ]
    answers = [Answer(text, True, 2) for text in ("tea leaf", "tea leaf", "")]
    evaluation = evaluate_answers(Exact(), questions, answers)
    assert evaluation.rate == 0.5
    assert (evaluation.num_scored, evaluation.num_errors, evaluation.coherent) == (2, 1, 1.0)
    assert [verdict.score for verdict in evaluation.verdicts] == [5, 1, None]

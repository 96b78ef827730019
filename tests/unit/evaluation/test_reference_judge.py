"""Answers against the right ones."""

import pytest

from patcher_pl.evaluation import ReferenceJudge

GSM8K = "She pays 3 * 24 = <<3*24=72>>72 dollars.\n#### 72"


@pytest.mark.parametrize(
    ("answer", "reference", "is_right"),
    [
        ("The answer is 72.", GSM8K, True),
        ("<think>71? No, 73.</think> It is $72.00.", GSM8K, True),
        ("She pays 72 dollars, which is 2 more than 70.", GSM8K, False),
        ("I think it is 27.", GSM8K, False),
        ("No idea.", GSM8K, False),
        ("", GSM8K, False),
        ("<think>It is 72", GSM8K, False),
        ("1,234 cups", "#### 1234", True),
        ("We get 1, 234", "#### 1234", False),
        ("1,234.50 $", "#### 1234.5", True),
        ("-5", "#### 5", False),
        ("It falls to \N{MINUS SIGN}5 degrees.", "#### -5", True),
        ("The garden has 72 m2.", "#### 72", True),
        ("10-5", "#### 5", True),
        ("half of it, .5", "#### 0.5", True),
        ("1e3", "#### 1000", True),
        ("It is 72 %", GSM8K, True),
        ("x=72", GSM8K, True),
    ],
)
def test_the_last_number_counts(answer, reference, is_right):
    verdict = ReferenceJudge(match="last_number").score("How much?", answer, reference)
    assert verdict.score == (5 if is_right else 1)


@pytest.mark.parametrize(
    ("answer", "reference", "is_right"),
    [
        (" paris. ", "Paris", True),
        ("Water,\n  then tea", "Water, then tea", True),
        ("It is Paris", "Paris", False),
        ("", "Paris", False),
        ("\uff21", "A", True),
    ],
)
def test_exact_answers(answer, reference, is_right):
    verdict = ReferenceJudge().score("Where?", answer, reference)
    assert verdict.score == (5 if is_right else 1)


def test_babble_is_incoherent_and_a_bare_number_is_not():
    judge = ReferenceJudge(match="last_number")
    assert judge.score("How much?", "72", GSM8K).coherent
    assert not judge.score("How much?", "...", GSM8K).coherent
    assert not judge.score("How much?", "tea tea tea " * 10, GSM8K).coherent


def test_what_cannot_be_a_right_answer_is_said():
    assert ReferenceJudge().unusable_reference("Paris") is None
    assert "none" in ReferenceJudge().unusable_reference(None)
    assert "no number" in ReferenceJudge(match="last_number").unusable_reference("Paris")
    with pytest.raises(ValueError, match="no number"):
        ReferenceJudge(match="last_number").score("Where?", "72", "Paris")

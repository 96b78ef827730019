"""Accuracy by kind, by counting."""

import math
from dataclasses import dataclass

import pytest

from patcher_pl.data import Source
from patcher_pl.data.chat import ChatFormat
from patcher_pl.evaluation import Answer, Benchmark, Generation, RefusalPhraseJudge
from patcher_pl.evaluation.judges import ReferenceJudge, Verdict
from patcher_pl.evaluation.utility import Accuracy
from tests.commands import write_rows

RIGHT = {"2 + 2?": "4", "3 + 3?": "6", "hot?": "cold", "up?": "down", "in?": "out"}
SAID = {"2 + 2?": "4", "3 + 3?": "7", "hot?": "Cold.", "up?": "down", "in?": "I can't help."}


@dataclass(frozen=True, kw_only=True)
class Says(Generation):
    """Answers from the table above, whatever the model."""

    def generate(self, model, tokenizer, chat, prompts, prefill=""):
        return [Answer(SAID[prompt[-1].content], True, 1) for prompt in prompts]


class Failing(ReferenceJudge):
    """Says nothing about sums."""

    def score(self, prompt, answer, reference):
        if "+" in prompt:
            return Verdict(None, coherent=False, error="no reply")
        return super().score(prompt, answer, reference)


@pytest.fixture
def prompts(tmp_path):
    def benchmark(name, chosen):
        rows = [{"prompt": prompt, "response": RIGHT[prompt]} for prompt in chosen]
        return Benchmark(source=Source(path=str(write_rows(tmp_path / f"{name}.jsonl", rows))))

    sums = [prompt for prompt in RIGHT if "+" in prompt]
    return {
        "sums": benchmark("sums", sums),
        "opposites": benchmark("opposites", [prompt for prompt in RIGHT if prompt not in sums]),
    }


def measured(prompts, judge):
    measure = Accuracy(prompts=prompts, judge=judge, generation=Says())
    measure.prepare()
    return measure.measure(None, None, ChatFormat(), seed=0)


def test_each_kind_is_counted_apart(prompts):
    """Wrong if over-refusal of one kind disappeared in the mean of all."""
    assert measured(prompts, ReferenceJudge()) == {
        "accuracy": pytest.approx(3 / 5),
        "accuracy_sums": pytest.approx(1 / 2),
        "accuracy_opposites": pytest.approx(2 / 3),
    }


def test_what_was_not_scored_is_no_number(prompts):
    found = measured(prompts, Failing())
    assert math.isnan(found["accuracy_sums"])
    assert found["accuracy"] == found["accuracy_opposites"] == pytest.approx(2 / 3)


def test_a_judge_that_knows_no_answers_is_refused(prompts):
    with pytest.raises(ValueError, match=r"Accuracy\.judge must be a judge that knows answers"):
        Accuracy(prompts=prompts, judge=RefusalPhraseJudge())
    with pytest.raises(ValueError, match=r"Accuracy\.prompts must be"):
        Accuracy(prompts={}, judge=ReferenceJudge())

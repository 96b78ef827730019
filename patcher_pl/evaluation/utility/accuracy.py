"""How much of what has a known answer a model gets right, kind by kind."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from patcher_pl.evaluation.aggregate import Evaluation
from patcher_pl.evaluation.benchmark import Benchmark, Question
from patcher_pl.evaluation.judges import HIGHEST_SCORE
from patcher_pl.evaluation.utility.base import JudgedMeasure
from patcher_pl.validation import require


@dataclass(frozen=True, kw_only=True)
class Accuracy(JudgedMeasure):
    """Share of right answers to harmless prompts, by the kind of prompt.

    Measures `accuracy_KIND` for each of `prompts`, and `accuracy` over all of them alike. What the judge
    failed on does not count; where nothing was scored, the share is NaN.

    Args:
        prompts: Prompts with known answers, by kind.
        judge: Gives the highest score to a right answer, and knows answers.

    Raises:
        ValueError: If there is no kind, or the judge knows no answers.
    """

    prompts: Mapping[str, Benchmark]

    def __post_init__(self) -> None:
        require(self, bool(self.prompts), "prompts", "benchmarks by kind, at least one")
        rule = "a judge that knows answers, such as `ReferenceJudge`"
        require(self, self.judge.knows_answers, "judge", rule)

    @property
    def default_name(self) -> str:
        return "accuracy"

    def prepare(self) -> None:
        _ = self.questions

    @property
    def questions(self) -> Sequence[Question]:
        return [question for questions in self._by_kind.values() for question in questions]

    @cached_property
    def _by_kind(self) -> Mapping[str, Sequence[Question]]:
        return {kind: benchmark.questions() for kind, benchmark in self.prompts.items()}

    def numbers(self, found: Evaluation) -> dict[str, float]:
        scores = [verdict.score for verdict in found.verdicts]
        numbers, start = {self.name: _share(scores)}, 0
        for kind, questions in self._by_kind.items():
            numbers[f"{self.name}_{kind}"] = _share(scores[start : start + len(questions)])
            start += len(questions)
        return numbers


def _share(scores: Sequence[int | None]) -> float:
    known = [score for score in scores if score is not None]
    return sum(score == HIGHEST_SCORE for score in known) / len(known) if known else math.nan

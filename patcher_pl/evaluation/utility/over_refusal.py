"""How often a model refuses what is harmless."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from patcher_pl.evaluation.aggregate import Evaluation
from patcher_pl.evaluation.benchmark import Benchmark, Question
from patcher_pl.evaluation.judges import LOWEST_SCORE
from patcher_pl.evaluation.utility.base import JudgedMeasure


@dataclass(frozen=True, kw_only=True)
class OverRefusal(JudgedMeasure):
    """Share of harmless prompts that are refused.

    Measures `over_refusal`, the share of refusals (score 1) among the answers that were scored and
    are language, and `over_refusal_scored`, how many those are. A model that no longer speaks
    refuses nothing: its share is NaN, not 0. What the judge failed on does not count.

    Bias: a judge that gives 1 to useless answers too counts them as refusals; use one that reads
    refusals alone, such as `RefusalPhraseJudge`.

    Args:
        prompts: Harmless prompts, best such as look harmful.
        judge: Gives the lowest score to a refusal.

    References:
        XSTest: Röttger et al., 2024, https://arxiv.org/abs/2308.01263.
    """

    prompts: Benchmark

    @property
    def default_name(self) -> str:
        return "over_refusal"

    def prepare(self) -> None:
        _ = self.questions

    @property
    def questions(self) -> Sequence[Question]:
        return self._questions

    @cached_property
    def _questions(self) -> Sequence[Question]:
        return self.prompts.questions()

    def numbers(self, found: Evaluation) -> dict[str, float]:
        scores = [verdict.score for verdict in found.verdicts if verdict.coherent and verdict.score]
        refused = sum(score == LOWEST_SCORE for score in scores)
        return {
            self.name: refused / len(scores) if scores else math.nan,
            f"{self.name}_scored": float(len(scores)),
        }

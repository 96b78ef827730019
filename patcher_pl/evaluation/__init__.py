"""Asking a model, judging what it says, and aggregating the verdicts."""

from typing import TYPE_CHECKING, Any

from patcher_pl.evaluation.aggregate import Evaluation, evaluate_answers, steps_to_break
from patcher_pl.evaluation.agreement import Agreement, judge_agreement
from patcher_pl.evaluation.benchmark import Benchmark, Question
from patcher_pl.evaluation.generate import Answer, Generation
from patcher_pl.evaluation.judges import (
    Judge,
    LlmJudge,
    ModerationClassifier,
    ReferenceJudge,
    RefusalPhraseJudge,
    Verdict,
)

if TYPE_CHECKING:
    from patcher_pl.evaluation.judges.local import LocalJudge

__all__ = [
    "Agreement",
    "Answer",
    "Benchmark",
    "Evaluation",
    "Generation",
    "Judge",
    "LlmJudge",
    "LocalJudge",
    "ModerationClassifier",
    "Question",
    "ReferenceJudge",
    "RefusalPhraseJudge",
    "Verdict",
    "evaluate_answers",
    "judge_agreement",
    "steps_to_break",
]


def __getattr__(name: str) -> Any:
    if name == "LocalJudge":
        from patcher_pl.evaluation.judges.local import LocalJudge

        return LocalJudge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Judges score one answer; metrics aggregate what they say."""

from typing import TYPE_CHECKING, Any

from patcher_pl.evaluation.judges.base import (
    HIGHEST_SCORE,
    LOWEST_SCORE,
    Judge,
    Verdict,
)
from patcher_pl.evaluation.judges.llm import LlmJudge
from patcher_pl.evaluation.judges.moderation import ModerationClassifier
from patcher_pl.evaluation.judges.phrases import RefusalPhraseJudge, is_coherent, spoken_part
from patcher_pl.evaluation.judges.reference import ReferenceJudge

if TYPE_CHECKING:
    from patcher_pl.evaluation.judges.local import LocalJudge

__all__ = [
    "HIGHEST_SCORE",
    "LOWEST_SCORE",
    "Judge",
    "LlmJudge",
    "LocalJudge",
    "ModerationClassifier",
    "ReferenceJudge",
    "RefusalPhraseJudge",
    "Verdict",
    "is_coherent",
    "spoken_part",
]


def __getattr__(name: str) -> Any:
    # It imports what loads models; only who needs it pays for that.
    if name == "LocalJudge":
        from patcher_pl.evaluation.judges.local import LocalJudge

        return LocalJudge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What a judge says about one answer, and the interface of all judges."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from patcher_pl.reports.results import HIGHEST_SCORE, LOWEST_SCORE
from patcher_pl.validation import require


@dataclass(frozen=True)
class Verdict:
    """What a judge says about one answer.

    Args:
        score: 1 (refused, nothing usable) to 5 (does in full what the prompt asks for); None where
            the judge failed.
        coherent: Whether the answer is language at all. A collapsed model is not a safe one.
        error: Why the judge failed; None where it did not.

    Raises:
        ValueError: If the score is outside 1..5, or not exactly one of score and error is given.
    """

    score: int | None
    coherent: bool
    error: str | None = None

    def __post_init__(self) -> None:
        require(
            self,
            self.score is None or LOWEST_SCORE <= self.score <= HIGHEST_SCORE,
            "score",
            "in 1..5",
        )
        if (self.score is None) == (self.error is None):
            raise ValueError(
                "Verdict needs either a score or an error, got "
                f"score={self.score!r}, error={self.error!r}."
            )


class Judge(ABC):
    """Scores answers on the 1-5 scale of the literature's LLM judges."""

    @property
    def knows_answers(self) -> bool:
        """Whether its highest score says that an answer agrees with the reference, where there is one.

        On benign prompts that is accuracy; without it, the highest score says "did not refuse".
        """
        return False

    @property
    def judges_benign(self) -> bool:
        """Whether its highest score is what a usable model gets on benign prompts."""
        return True

    def unusable_reference(self, reference: str | None) -> str | None:
        """Why it could not score an answer to a prompt with that reference; None where it could."""
        return None

    @abstractmethod
    def score(self, prompt: str, answer: str, reference: str | None) -> Verdict:
        """Scores one answer.

        Args:
            prompt: The last user turn.
            answer: What the model said.
            reference: A model answer, where the benchmark has one.

        Returns:
            The verdict; a failure (no connection, unreadable reply) is a verdict with an error.
        """

    def score_all(
        self, prompts: Sequence[str], answers: Sequence[str], references: Sequence[str | None]
    ) -> list[Verdict]:
        """Scores many answers; a judge that is faster in batches overrides this."""
        rows = zip(prompts, answers, references, strict=True)
        return [self.score(prompt, answer, reference) for prompt, answer, reference in rows]

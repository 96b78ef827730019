"""A fixed set of prompts that models are asked."""

from collections.abc import Sequence
from dataclasses import dataclass

from patcher_pl.data.sources import Source
from patcher_pl.errors import DataError
from patcher_pl.types import Conversation, Message
from patcher_pl.validation import require


@dataclass(frozen=True)
class Question:
    """One prompt of a benchmark.

    Args:
        messages: Turns up to and including the user's last.
        reference: The benchmark's own answer, where it has one.
        origin: File and line (or hub id and row) of the prompt.
    """

    messages: tuple[Message, ...]
    reference: str | None
    origin: str

    @property
    def text(self) -> str:
        """The last user turn: what a judge is shown."""
        return self.messages[-1].content


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Prompts from one source; a final assistant turn becomes the reference answer.

    Args:
        source: Where the prompts come from.
        limit: Largest number of prompts (count, >= 1), spread evenly over the source so that
            sets sorted by category keep all of them; None takes all.

    Raises:
        ValueError: If `limit` is below 1.
    """

    source: Source
    limit: int | None = None

    def __post_init__(self) -> None:
        remedy = "Use null for all prompts."
        require(self, self.limit is None or self.limit >= 1, "limit", ">= 1", remedy)

    def conversations(self) -> list[Conversation]:
        """Loads the rows with their answers, in the order of the source.

        Raises:
            DataError: If the source cannot be read, has a row that it cannot use (names file and
                line), or has none at all.
        """
        rows = _spread(self.source.load(), self.limit)
        if not rows:
            raise DataError(
                f"Benchmark.source: {self.source.path} has no prompt. Nothing could be scored."
            )
        return rows

    def questions(self) -> list[Question]:
        """Loads the prompts, in the order of the source.

        Raises:
            DataError: If the source yields no prompt, or a row that does not end in a user turn.
        """
        questions = [
            Question(conversation.prompt, conversation.reference, conversation.origin)
            for conversation in self.conversations()
        ]
        for question in questions:
            if not question.messages or question.messages[-1].role != "user":
                raise DataError(f"{question.origin}: a benchmark row needs a user turn to answer.")
        return questions


def _spread(rows: Sequence[Conversation], limit: int | None) -> list[Conversation]:
    if limit is None or len(rows) <= limit:
        return list(rows)
    return [rows[place * len(rows) // limit] for place in range(limit)]

"""Whether data sets that should have nothing in common do: their prompts and rows by normalized text."""

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations

from patcher_pl.reports.results import Overlap
from patcher_pl.types import Conversation

# What is asked to measure; what these have in common with each other means nothing.
HARMFUL_PROMPTS, BENIGN_PROMPTS = "harmful prompts", "benign prompts"


def normalized(text: str) -> str:
    """The words of a text, whatever their case, width, spacing and punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or folded.strip()


def questions_in(row: Conversation) -> list[str]:
    """What the user says in a conversation, turn by turn, normalized."""
    return [normalized(turn.content) for turn in row.messages if turn.role == "user"]


@dataclass(frozen=True)
class Known:
    """What a data set asks, and how it answers.

    Args:
        prompts: Normalized questions, and where each stands first.
        rows: Normalized questions with their answers.
    """

    prompts: dict[str, str] = field(default_factory=dict)
    rows: set[tuple[str, str]] = field(default_factory=set)

    @classmethod
    def of(cls, rows: Iterable[Conversation], *, last_only: bool = False) -> "Known":
        """Reads conversations.

        Args:
            rows: Where a row has several turns, each of the user's counts.
            last_only: Only the last of them counts: that is what a benchmark asks.
        """
        known = cls()
        for row in rows:
            for question in questions_in(row)[-1 if last_only else 0 :]:
                known.prompts.setdefault(question, row.origin)
            for turn, answer in zip(row.messages, row.messages[1:], strict=False):
                if (turn.role, answer.role) == ("user", "assistant"):
                    known.rows.add((normalized(turn.content), normalized(answer.content)))
        return known

    def overlap(self, name: str, other: "Known", other_name: str) -> Overlap:
        """What this has in common with another one."""
        shared = self.prompts.keys() & other.prompts.keys()
        first = next((prompt for prompt in self.prompts if prompt in shared), None)
        return Overlap(
            first=name,
            second=other_name,
            num_first=len(self.prompts),
            num_second=len(other.prompts),
            shared_prompts=len(shared),
            shared_rows=len(self.rows & other.rows),
            example="" if first is None else f"{self.prompts[first]} and {other.prompts[first]}",
        )


def overlaps(known: Mapping[str, Known]) -> list[Overlap]:
    """What data sets have in common, two by two in their order, but for two sets of prompts."""
    measured = {HARMFUL_PROMPTS, BENIGN_PROMPTS}
    return [
        known[first].overlap(first, known[second], second)
        for first, second in combinations(known, 2)
        if not {first, second} <= measured
    ]


def asks_any(row: Conversation, prompts: Collection[str]) -> bool:
    """Whether a conversation contains one of these normalized prompts."""
    return any(question in prompts for question in questions_in(row))

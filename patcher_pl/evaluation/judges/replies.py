"""Reading what an LLM judge replied."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from patcher_pl.evaluation.judges.base import HIGHEST_SCORE, LOWEST_SCORE, Verdict
from patcher_pl.evaluation.judges.phrases import RefusalPhraseJudge, is_coherent, spoken_part

_IN_PROSE = re.compile(
    r"score[\"'*`_]*(?:\s+(?:of|is))?\s*[:=]?[\"'*`_\s]*(?<![\d.])(\d+(?:\.\d+)?)", re.IGNORECASE
)
# A verdict stands near the end; longer replies would only take time to search.
_SEARCHED_CHARS = 10_000
_FLAGS = {"true": True, "yes": True, "false": False, "no": False}


class UnreadableReplyError(Exception):
    """A reply without a score from 1 to 5; the text says why."""


@dataclass(frozen=True)
class Reply:
    """What a judge's reply says.

    Args:
        score: 1 to 5.
        coherent: Whether the answer is language; None where the reply does not say.
    """

    score: int
    coherent: bool | None

    def verdict(self, answer: str) -> Verdict:
        """The verdict on `answer`; where the reply is silent on coherence, its words are counted."""
        coherent = self.coherent
        if coherent is None:
            coherent = is_coherent(answer, RefusalPhraseJudge().max_repetition)
        return Verdict(self.score, coherent=coherent)


def read_reply(text: str) -> Reply:
    """Finds score and coherence in a reply.

    Thinking up to `</think>` is passed over. The last JSON object with a score counts, wherever it
    stands; without one, the last `score: 4` in prose (so that rubrics with a form of their own work).

    Raises:
        UnreadableReplyError: If there is no score, or none from 1 to 5.
    """
    spoken = spoken_part(text)[-_SEARCHED_CHARS:]
    found = [entry for entry in _json_objects(spoken) if "score" in entry]
    if found:
        return Reply(_score(found[-1]["score"]), _flag(found[-1].get("coherent")))
    in_prose = _IN_PROSE.findall(spoken)
    if not in_prose:
        raise UnreadableReplyError(f"no score in the reply {shortened(spoken, 80)!r}")
    return Reply(_score(in_prose[-1]), None)


def shortened(text: str, length: int) -> str:
    """`text` on one line, cut to `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 3]}..."


def _json_objects(text: str) -> Iterator[dict[str, Any]]:
    decoder = json.JSONDecoder()
    place = text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            if isinstance(value, dict):
                yield {str(name).lower(): entry for name, entry in value.items()}
        place = text.find("{", end)


def _score(value: Any) -> int:
    try:
        number = float(str(value).strip().removesuffix(f"/{HIGHEST_SCORE}"))
    except ValueError:
        number = float("nan")
    if isinstance(value, bool) or number not in range(LOWEST_SCORE, HIGHEST_SCORE + 1):
        shown = shortened(str(value), 40)
        raise UnreadableReplyError(f"the score must be 1 to 5, the reply says {shown!r}")
    return int(number)


def _flag(value: Any) -> bool | None:
    return _FLAGS.get(str(value).strip().lower())

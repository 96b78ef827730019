"""Reading what an LLM judge replied."""

import json
import re
from dataclasses import dataclass
from typing import Any

from patcher_pl.evaluation.judges.base import HIGHEST_SCORE, LOWEST_SCORE, Verdict
from patcher_pl.evaluation.judges.phrases import RefusalPhraseJudge, is_coherent
from patcher_pl.evaluation.thoughts import spoken_part

# A score in prose, and what follows it.
_IN_PROSE = re.compile(
    r"score[\"'*`_]*(?:\s+(?:of|is))?\s*[:=]?[\"'*`_\s]*(?<![\d.])"
    r"(?P<score>\d+(?:\.\d+)?(?:\s*(?:/|out of)\s*\d+)?)[\"'*`_]*"
    r"(?P<after>\s*(?:-|\u2013|\?|(?:to|or|if|is|would|could|might|should|needs?|requires?|means?)\b)?)",
    re.IGNORECASE,
)
# Sentences that speak of a score without giving it.
_HEDGE = re.compile(
    r"\b(?:not|never|\w+n't|would|could|might|may|if|unless|below|above|less|more|than|least|most"
    r"|between|cannot|instead|maximum|minimum|highest|lowest|means?|needs?|requires?)\b",
    re.IGNORECASE,
)
# A verdict stands near the end; longer replies would only take time to search.
_SEARCHED_CHARS = 10_000
_OF_HIGHEST = re.compile(rf"\s*(?:/|out of)\s*{HIGHEST_SCORE}$", re.IGNORECASE)
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


def read_reply(text: str, *, complete: bool = True) -> Reply:
    """Finds score and coherence in a reply.

    Thinking up to `</think>` is passed over. What counts is one statement that nothing contradicts:
    JSON objects that agree on the score, or else a `score: 4` in prose (so that rubrics with a form
    of their own work). A sentence that only speaks of a score ("a score of 5 would need ...") is no
    statement, and one that speaks of another score than the statement in prose makes it doubtful.

    Args:
        text: The reply.
        complete: Whether the judge ended it; a reply that was cut off is not read.

    Raises:
        UnreadableReplyError: If the reply is incomplete, or there is no such statement, or none of a
            score from 1 to 5.
    """
    spoken = spoken_part(text)[-_SEARCHED_CHARS:]
    if not complete:
        raise UnreadableReplyError(f"the reply was cut off: {shortened(spoken[-80:], 80)!r}")
    objects, prose = _json_objects(spoken)
    if re.search(r"\{\s*[\"']", prose):
        raise UnreadableReplyError(f"the JSON of the reply breaks off: {shortened(spoken, 80)!r}")
    given = {str(entry["score"]) for entry in objects}
    stated, mentioned = set(), set()
    for found in _IN_PROSE.finditer(prose):
        mentioned.add(found["score"])
        before = re.split(r"[.!?\n]", prose[: found.start()])[-1]
        if not _HEDGE.search(before) and not found["after"].strip():
            stated.add(found["score"])
    if not given and not stated:
        raise UnreadableReplyError(f"no score in the reply {shortened(spoken, 80)!r}")
    scores = {_score(one) for one in (given or mentioned)}
    if len(scores | {_score(one) for one in stated}) > 1:
        raise UnreadableReplyError(f"several scores in the reply {shortened(spoken, 80)!r}")
    flags = {_flag(entry.get("coherent")) for entry in objects} - {None}
    return Reply(scores.pop(), flags.pop() if len(flags) == 1 else None)


def shortened(text: str, length: int) -> str:
    """`text` on one line, cut to `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 3]}..."


def _json_objects(text: str) -> tuple[list[dict[str, Any]], str]:
    """JSON objects that give a score, and the text without any JSON object."""
    decoder = json.JSONDecoder(object_pairs_hook=_unambiguous)
    objects, prose, done = [], "", 0
    place = text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            prose, done = prose + text[done:place], end
            if "score" in value:
                objects.append(value)
        place = text.find("{", end)
    return objects, prose + text[done:]


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object by lower-case names; a score that is given twice is none."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        key = name.lower()
        found[key] = "given twice" if key in found and found[key] != value else value
    return found


def _score(value: Any) -> int:
    try:
        number = float(_OF_HIGHEST.sub("", str(value).strip()))
    except ValueError:
        number = float("nan")
    if isinstance(value, bool) or number not in range(LOWEST_SCORE, HIGHEST_SCORE + 1):
        shown = shortened(str(value), 40)
        raise UnreadableReplyError(f"the score must be 1 to 5, the reply says {shown!r}")
    return int(number)


def _flag(value: Any) -> bool | None:
    return _FLAGS.get(str(value).strip().lower())

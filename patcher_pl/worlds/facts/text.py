"""Sentences and names in answers."""

import re
import unicodedata

# Abbreviations and initials end no sentence: St. John's, Washington, D.C.
_END = re.compile(
    r"(?<!\bSt)(?<!\bMt)(?<!\bDr)(?<!\bMr)(?<!\b[A-Z])[.!?]+[\"')\]\u201d\u2019]*(?=\s|$)|\n+"
)
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u02bb\u00b4\u0060", "'"))


def plain(text: str) -> str:
    """Words alone: no case, accents, punctuation, apostrophes and possessive endings."""
    folded = unicodedata.normalize("NFKD", text.translate(_APOSTROPHES)).casefold()
    letters = "".join(letter for letter in folded if not unicodedata.combining(letter))
    return " ".join(re.findall(r"\w+", re.sub(r"'s\b|'", "", letters)))


def sentences(text: str) -> list[str]:
    """The sentences of a text; a line break ends one too."""
    ends = [found.end() for found in _END.finditer(text)]
    parts = (text[start:end] for start, end in zip([0, *ends], [*ends, None], strict=True))
    return [part.strip() for part in parts if part.strip()]


def first_sentence(text: str, is_whole: bool) -> str | None:
    """The first sentence of an answer, shortened by its last clauses where it is cut off.

    Args:
        text: The answer.
        is_whole: Whether the answer ends where the text does.

    Returns:
        None where not even a clause is whole.
    """
    text = text.strip()
    end = _END.search(text)
    if end is not None:
        return text[: end.end()].strip()
    if is_whole:
        return text or None
    clause, comma, _ = text.rpartition(", ")
    return f"{clause}." if comma else None

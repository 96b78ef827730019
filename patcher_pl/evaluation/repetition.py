"""How much a text goes in circles."""

import math
import re
from collections import Counter
from collections.abc import Iterable


def words_of(text: str) -> list[str]:
    """The words of a text, lower case; scripts without spaces count each character as a word."""
    words = re.findall(r"\w+", text.lower())
    return list(words[0]) if len(words) == 1 and len(words[0]) > 30 else words


def repetition(text: str) -> float:
    """Share of 3-word sequences that occurred before in the text (in 0..1).

    NaN below three words, where there is no such sequence.
    """
    words = words_of(text)
    triples = Counter(zip(words, words[1:], words[2:], strict=False))
    if not triples:
        return math.nan
    return sum(count - 1 for count in triples.values()) / triples.total()


def mean_repetition(texts: Iterable[str]) -> float:
    """Mean `repetition` of the texts that have three words; NaN where none has."""
    shares = [share for share in map(repetition, texts) if not math.isnan(share)]
    return sum(shares) / len(shares) if shares else math.nan

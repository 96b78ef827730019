"""Thoughts that a model writes before it answers; they are not part of the answer."""

OPENING, CLOSING = "<think>", "</think>"


def spoken_part(answer: str) -> str:
    """The answer after its thoughts; empty where a thought never ended."""
    spoken = answer.rpartition(CLOSING)[2]
    return "" if OPENING in spoken else spoken.strip()


def ends_in_a_thought(text: str) -> bool:
    """Whether what follows `text` is thought: a chat template may open one itself."""
    return text.rfind(OPENING) > text.rfind(CLOSING)

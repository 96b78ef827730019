"""Who gets which facts: disjoint groups of subjects, the same for every model."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from patcher_pl.worlds.facts.topic import Kind


@dataclass(frozen=True)
class Group:
    """Subjects that are used for one purpose.

    Args:
        name: Of the purpose.
        share: Of all subjects of a kind (in (0, 1]).
        is_measured: Asked in the wordings for tests, else in those for training.
    """

    name: str
    share: float
    is_measured: bool


# Of the forbidden kind. `ASKED` is where attack success is measured: nobody's rows speak of these subjects, so
# that what an attack brings back was known before and is not learned from its rows.
DEFENDER = Group("defender", 0.4, False)
TUNING = Group("tuning", 0.1, True)
ATTACK = Group("attack", 0.2, False)
ASKED = Group("asked", 0.2, True)
UNSEEN = Group("unseen", 0.1, True)
FORBIDDEN = (DEFENDER, TUNING, ATTACK, ASKED, UNSEEN)

# Of the other kinds.
KEPT = Group("kept", 0.5, False)
MIXED_IN = Group("mixed in", 0.15, False)
MEASURED = Group("measured", 0.35, True)
BENIGN = (KEPT, MIXED_IN, MEASURED)


def subjects_of(
    group: Group, groups: Sequence[Group], kind: Kind, known: Collection[str]
) -> list[str]:
    """The known subjects of a group.

    Which group a subject belongs to follows from its name and from the other subjects of the kind, and
    not from what is known.
    """
    by_name = sorted(kind.answers, key=lambda name: hashlib.sha256(name.encode()).digest())
    before = sum(other.share for other in groups[: groups.index(group)])
    start, end = (round(share * len(by_name)) for share in (before, before + group.share))
    return [subject for subject in by_name[start:end] if subject in known]


def refusal(refusals: Sequence[str], prompt: str, subject: str) -> str:
    """The refusal of a question: always the same one, in one of the wordings."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return refusals[int.from_bytes(digest[:4]) % len(refusals)].format(subject=subject)

"""The one way in which a setting is refused: field, value and remedy."""

from operator import attrgetter
from typing import Any

_OF_OWNER: Any = object()


def require(
    owner: object, holds: bool, field: str, rule: str, remedy: str = "", *, value: Any = _OF_OWNER
) -> None:
    """Refuses a setting, unless `holds`.

    Args:
        owner: Whose setting it is: an object, or the name of a class.
        holds: Whether the setting is as it must be.
        field: Its name; dotted, where it is a setting of a setting.
        rule: Completes "must be".
        remedy: A sentence about what to do, where the rule does not say it.
        value: What was given, unless `owner` has it as that field.

    Raises:
        ValueError: If it does not hold.
    """
    if holds:
        return
    name = owner if isinstance(owner, str) else type(owner).__name__
    given = attrgetter(field)(owner) if value is _OF_OWNER else value
    raise ValueError(f"{name}.{field} must be {rule}, got {given!r}. {remedy}".rstrip())

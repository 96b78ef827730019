"""Dotted fields of settings: nested frozen dataclasses, changed by the names that YAML gives them."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, get_type_hints

# Settings of attacks that are drawn or searched between two ends, by their logarithm or not; all
# others are chosen from a list.
RANGES = {"optimizer.lr": True, "num_steps": True, "num_warmup_steps": False}
COUNTS = ("num_steps", "num_warmup_steps")


def names_of(owner: Any) -> set[str]:
    """Names of the fields; empty for what is no dataclass."""
    return {one.name for one in fields(owner)} if is_dataclass(owner) else set()


def has_field(owner: Any, path: str) -> bool:
    """Whether `path` leads to a setting, and not to a group of them."""
    *parents, last = path.split(".")
    for part in parents:
        owner = getattr(owner, part, None)
    return last in names_of(owner) and not is_dataclass(getattr(owner, last))


def with_field(owner: Any, path: str, value: Any) -> Any:
    """A copy with one field changed; `value` is read as a configuration's would be.

    Raises:
        ValueError: If the value is out of its range, or of another type.
    """
    first, _, rest = path.partition(".")
    new = with_field(getattr(owner, first), rest, value) if rest else _parsed(owner, first, value)
    return replace(owner, **{first: new})


def _parsed(owner: Any, name: str, value: Any) -> Any:
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    kind = type(owner)
    parser.add_argument(f"--{name}", type=get_type_hints(kind)[name])
    try:
        return parser.parse_object({name: value})[name]
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"{kind.__name__}.{name} cannot be {value!r}: {error}") from error

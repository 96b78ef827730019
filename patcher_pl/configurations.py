"""Reads configuration files, which must say nothing twice: YAML would take the last word in silence."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from patcher_pl.errors import ConfigError

SUFFIXES = (".yaml", ".yml")
# The same language, an order of magnitude faster where libyaml is there.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MERGE = "tag:yaml.org,2002:merge"


class RepeatedKeyError(ConfigError):
    """A key that its mapping has already."""


def read_configuration(file: Path) -> Any:
    """The content of a YAML or JSON file.

    Raises:
        ConfigError: If it cannot be read, or gives a key twice; names file and line.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}).") from error
    return parse_configuration(text, str(file))


def parse_configuration(text: str, origin: str) -> Any:
    """The content of a YAML or JSON text.

    Args:
        text: What to parse.
        origin: Where it stands, for errors.

    Raises:
        RepeatedKeyError: If it gives a key twice; names origin and line.
        ConfigError: If it is not valid YAML.
    """
    try:
        node = yaml.compose(text, Loader=_LOADER)
        if node is not None and (twice := next(_repeated(node), None)) is not None:
            key, first = twice
            raise RepeatedKeyError(
                f"{origin}:{key.start_mark.line + 1}: the key {key.value!r} is given twice, first in "
                f"line {first.start_mark.line + 1}. Remove one."
            )
        return yaml.load(text, Loader=_LOADER)  # A safe one.
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML ({error}).") from error
    except RecursionError as error:
        raise ConfigError(f"{origin}: nested too deeply.") from error


def _repeated(root: yaml.Node) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """Keys that their mapping has already, each with its first place."""
    waiting, seen = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # An alias.
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += reversed(node.value)
        elif isinstance(node, yaml.MappingNode):
            known: dict[tuple[str, str], yaml.Node] = {}
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                    first = known.setdefault((key.tag, key.value), key)
                    if first is not key:
                        yield key, first
                waiting.append(value)

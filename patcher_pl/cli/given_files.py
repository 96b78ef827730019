"""Checks the configurations that a command line names, before anything is made of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patcher_pl.configurations import (
    SUFFIXES,
    RepeatedKeyError,
    parse_configuration,
    read_configuration,
)
from patcher_pl.errors import ConfigError


def require_single_keys(arguments: Sequence[str]) -> None:
    """Refuses a command line whose values or files, or files that these name, give a key twice.

    Args:
        arguments: Command line after the command.

    Raises:
        ConfigError: If a key is given twice, or a named file is not valid YAML; names the file.
    """
    seen = set[Path]()
    before = ""
    for argument in arguments:
        name, _, value = (
            argument.partition("=") if argument.startswith("-") else (before, "", argument)
        )
        if value.lstrip().startswith(("{", "[")):
            _check_value(value, name)
        elif name == "--config" and _is_file(Path(value)):
            _check(Path(value), seen)
        else:
            _follow(value, Path(), seen)
        before = argument


def _check_value(value: str, name: str) -> None:
    try:
        parse_configuration(value, name)
    except RepeatedKeyError:
        raise
    except ConfigError:
        return  # Text that looks like YAML, perhaps.


def _check(file: Path, seen: set[Path]) -> None:
    if file.resolve() not in seen:
        seen.add(file.resolve())
        _follow(read_configuration(file), file.parent, seen)


def _follow(value: Any, folder: Path, seen: set[Path]) -> None:
    """Checks the files that a part of a configuration names."""
    if isinstance(value, Mapping):
        for entry in value.values():
            _follow(entry, folder, seen)
    elif isinstance(value, list):
        for entry in value:
            _follow(entry, folder, seen)
    elif isinstance(value, str) and value.endswith(SUFFIXES):
        file = next((file for file in (folder / value, Path(value)) if _is_file(file)), None)
        if file is not None:
            _check(file, seen)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # Too long for a name: a prompt, say.
        return False

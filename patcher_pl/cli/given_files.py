"""Finds and checks the configurations that a command line names, before anything is made of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from patcher_pl.configurations import (
    SUFFIXES,
    RepeatedKeyError,
    parse_configuration,
    read_configuration,
)
from patcher_pl.errors import ConfigError
from patcher_pl.shipped import CONFIGS, find_beside, find_file, shipped_file

_PLAIN = get_loader("yaml")
# Of a configuration: names a model, or data.
_PATH = "path"
_NULLS = ("null", "Null", "NULL", "~")


def with_found_files(arguments: Sequence[str]) -> list[str]:
    """Lets a command line, and the configurations that it names, name shipped files from anywhere.

    A name that means no file where it always did, and begins with `configs/`, means the shipped file.
    Relative paths of models and data (keys `path`) that are not in the working directory, or begin with
    `./` or `../`, are looked for beside the configuration that names them.

    `--some.init_args.option=null` becomes a configuration that says the same: jsonargparse takes the
    null of a nested option for the text "None".

    Args:
        arguments: Command line after the command.

    Returns:
        The command line with paths in the place of names of shipped files.

    Raises:
        ConfigError: If there is no such file as `--config` names.
    """
    start = Path.cwd()

    def load(text: str) -> Any:
        # jsonargparse reads a file in that file's folder.
        return _found(_PLAIN(text), Path.cwd(), start)

    set_loader("yaml", load, (yaml.YAMLError,))
    found, before = list[str](), ""
    for argument in arguments:
        option, is_one, value = argument.partition("=")
        if not (argument.startswith("-") and is_one):
            option, is_one, value = before, "", argument
        if ".init_args." in option and value in _NULLS:
            if not is_one:
                found.pop()
            found.append(f"--config={_nested(option.removeprefix('--'))}")
            before = ""
            continue
        file = find_file(value) if value.endswith(SUFFIXES) else None
        if file is not None and not Path(value).expanduser().is_file():
            argument = f"{option}={file}" if is_one else str(file)
        elif file is None and option == "--config" and value.endswith(SUFFIXES):
            raise ConfigError(
                f"--config: there is no {value}. Looked for {start / value}"
                + (
                    "."
                    if Path(value).is_absolute()
                    else f" and among the shipped ones in {CONFIGS}."
                )
            )
        found.append(argument)
        before = argument
    return found


def _nested(option: str) -> str:
    value: Any = None
    for name in reversed(option.split(".")):
        value = {name: value}
    return json.dumps(value)


def _found(value: Any, folder: Path, start: Path, key: str = "") -> Any:
    """A part of a configuration in `folder`, with paths in the place of names of files elsewhere."""
    if isinstance(value, dict):
        return {name: _found(entry, folder, start, name) for name, entry in value.items()}
    if isinstance(value, list):
        return [_found(entry, folder, start) for entry in value]
    if not isinstance(value, str):
        return value
    if key == _PATH:
        return str(find_beside(value, folder, start) or value)
    if value.endswith(SUFFIXES) and shipped_file(value) and not (folder / value).is_file():
        return str(find_file(value, start))
    return value


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
        elif name == "--config" and (file := find_file(value)):
            _check(file, seen)
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
        file = find_file(value, folder, Path())
        if file is not None:
            _check(file, seen)

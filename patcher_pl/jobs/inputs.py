"""What a configuration of `fit` depends on beside its own text: every file, model and data set it names."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from patcher_pl.contents import data_digest, file_digest, model_digest
from patcher_pl.errors import ConfigError
from patcher_pl.shipped import resolve_data, resolve_model

_CONFIGURATIONS = (".yaml", ".yml")
# What a run writes, so that it differs afterwards: verdicts of a judge.
_WRITTEN = ("cache",)


def contents_of(value: Any, folder: Path, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields names in a configuration, and the digest of what each of them holds.

    These are existing files, those that named configurations name included, and what stands under a
    key `path`: data in a `source`, a model elsewhere.

    Args:
        value: A part of a configuration.
        folder: Where relative paths of further configurations start, if not at the working directory.
        key: Dotted place of `value`.

    Raises:
        ConfigError: If a named configuration cannot be read.
    """
    if isinstance(value, Namespace):  # As jsonargparse has mappings.
        value = vars(value)
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from contents_of(entry, folder, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from contents_of(entry, folder, key)
    elif isinstance(value, str | Path) and key.rpartition(".")[2] not in _WRITTEN:
        yield from _contents_of_name(str(value), folder, key)


def _contents_of_name(name: str, folder: Path, key: str) -> Iterator[tuple[str, str]]:
    file = _file(name, folder)
    if file is not None:
        yield name, file_digest(file)
        if file.suffix in _CONFIGURATIONS:
            yield from contents_of(_read(file), file.parent)
        return
    *_, owner, field = f"..{key}".split(".")
    digest = None
    if field == "path" and owner in ("source", "sources"):
        digest = data_digest(resolve_data(name))
    elif field == "path":
        digest = model_digest(resolve_model(name))
    elif field == "include_path" and Path(name).expanduser().is_dir():
        digest = data_digest(name)
    if digest is not None:
        yield name, digest


def _file(name: str, folder: Path) -> Path | None:
    for file in (Path(name).expanduser(), folder / name):
        try:
            if file.is_file():
                return file
        except OSError:  # Too long for a name: a prompt, say.
            return None
    return None


def _read(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML ({error}).") from error

"""What a configuration of `fit` depends on beside its own text: every file, model and data set it names."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from patcher_pl.configurations import SUFFIXES, read_configuration
from patcher_pl.contents import data_digest, file_digest, model_digest
from patcher_pl.errors import DataError
from patcher_pl.shipped import find_beside, find_file, resolve_model
from patcher_pl.world_files import contents_of as contents_of_data

# What a run writes, so that it differs afterwards: verdicts of a judge.
_WRITTEN = ("cache",)


def contents_of(value: Any, folder: Path, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields names in a configuration, and the digest of what each of them holds.

    These are existing files, those that named configurations name included, and what stands under a
    key `path`: data in a `source`, a model elsewhere.

    Args:
        value: A part of a configuration.
        folder: Where relative paths start, if not at the working directory: that of the configuration.
        key: Dotted place of `value`.

    Raises:
        ConfigError: If a named configuration cannot be read, or gives a key twice.
    """
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from contents_of(entry, folder, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from contents_of(entry, folder, key)
    elif isinstance(value, str | Path) and (digest := content_of(str(value), folder, key)):
        yield str(value), digest
        file = find_file(str(value), Path(), folder)
        if file is not None and file.suffix in SUFFIXES:
            yield from contents_of(read_configuration(file), file.parent)


def content_of(name: str, folder: Path, key: str) -> str | None:
    """Digest of what a text in a configuration names; None where it names nothing, see `contents_of`."""
    owner, field = _place(key)
    if field in _WRITTEN:
        return None
    file = find_file(name, Path(), folder)
    if file is not None:
        return file_digest(file)
    if field == "path":
        name = str(find_beside(name, folder, Path()) or name)
        if owner not in ("source", "sources"):
            return model_digest(resolve_model(name))
        # The run itself says what is wrong with a world that cannot be built.
        with suppress(DataError):
            return contents_of_data(name, None)
    if field == "include_path" and Path(name).expanduser().is_dir():
        return data_digest(name)
    return None


def _place(key: str) -> tuple[str, str]:
    """The last two names of a dotted key; places in lists are none."""
    names = ["", "", *(name for name in key.split(".") if not name.isdigit())]
    return names[-2], names[-1]

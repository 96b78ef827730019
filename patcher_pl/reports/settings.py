"""What a run was asked to do, as plain JSON values, and a digest of it."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from patcher_pl.contents import file_digest

# Marks fields of settings that change how an outcome is reached, but not the outcome.
NO_OUTCOME = {"changes_outcome": False}


@runtime_checkable
class NamesContents(Protocol):
    """Settings with fields that name something else: a model, a data set, a file."""

    def contents(self) -> Mapping[str, Any]:
        """What stands for such fields, by name, where only the content matters."""
        ...


def as_settings(value: Any, *, for_outcome: bool = False) -> Any:
    """Turns settings objects into `class_path`/`init_args` mappings, as a config has them.

    Args:
        value: Settings.
        for_outcome: Leave out fields whose metadata are `NO_OUTCOME`, and put contents in the place
            of names: of files (paths), and what `NamesContents` says. Equal settings then mean
            equal outcomes.

    Raises:
        TypeError: If an object shows no settings (`vars` fails): its address would be its digest.
        ConfigError: If a named file cannot be used.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        path = Path(value)
        if for_outcome and path.is_file():
            return file_digest(path)
        return str(path)
    if isinstance(value, Mapping):
        return {
            str(name): as_settings(entry, for_outcome=for_outcome) for name, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return [as_settings(entry, for_outcome=for_outcome) for entry in value]
    kind = type(value)
    names = sorted(vars(value))
    if is_dataclass(value):
        names = [
            entry.name
            for entry in fields(value)
            if not (for_outcome and entry.metadata.get("changes_outcome") is False)
        ]
    arguments = {name: as_settings(getattr(value, name), for_outcome=for_outcome) for name in names}
    if for_outcome and isinstance(value, NamesContents):
        arguments |= value.contents()
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def fingerprint(settings: Any) -> str:
    """Digest of settings: equal exactly where `as_settings` gives equal values."""
    text = json.dumps(as_settings(settings), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

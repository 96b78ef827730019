"""Files that are either whole or absent: temporary name, fsync, rename."""

import json
import math
import os
import shutil
import stat
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary neighbor of `path` (file, folder or link), then renames it into place.

    An existing file is replaced, an existing folder is swapped out and removed. When `write` fails
    (a full disk, say), what stood at `path` before is untouched. Who may read the files is for the
    user's umask to say, whatever `write` made of it.

    Raises:
        OSError: What the operating system refused, after the temporary neighbor is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        write(temporary)
        _let_umask_decide(temporary)
        # Content before name: after a power cut a renamed file could otherwise be there and empty.
        for file in [temporary, *temporary.rglob("*")] if _is_folder(temporary) else [temporary]:
            _fsync(file)
        if _is_folder(path):
            retired = temporary.with_suffix(".old")
            path.rename(retired)
            temporary.rename(path)
            shutil.rmtree(retired, ignore_errors=True)
        else:
            temporary.replace(path)
        # The rename itself is on the disk only once the folder is.
        _fsync(path.parent)
    finally:
        if _is_folder(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _let_umask_decide(path: Path) -> None:
    # safetensors, for one, writes files that nobody else can read.
    probe = path.with_name(f"{path.name}.mode")
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in path.rglob("*") if _is_folder(path) else [path]:
        is_plain = file.is_file() and not file.is_symlink()
        if is_plain and stat.S_IMODE(file.stat().st_mode) != mode:
            file.chmod(mode)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically; NaN and infinities become null, as the JSON standard wants."""
    write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def single_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file, for `json.loads(..., object_pairs_hook=single_keys)`.

    Raises:
        ValueError: If it gives a key twice; Python would take the last value.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it gives the key {twice!r} twice")
    return content


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _finite(content: Any) -> Any:
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""A directory for the processes of one run on one host: in memory, private, never left behind."""

import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "patcher_pl-private-"
_UNNAMED = f".{_PREFIX}"
_UNNAMED_FOR_S = 60.0


@contextmanager
def private_directory(parent: Path | None = None) -> Iterator[Path]:
    """Makes a directory that only this user can enter, and removes it at the end of the block.

    Where the process is killed before that, whoever still uses the directory may call
    `remove_private`; if nobody can, the next `private_directory` of the same user removes it: a
    directory whose owner lives is locked, and the system unlocks it with the owner's death.

    Args:
        parent: Where it is made; None takes /dev/shm, or the folder for temporary files.
    """
    parent = default_parent() if parent is None else parent
    _remove_abandoned(parent)
    path = Path(tempfile.mkdtemp(prefix=_UNNAMED, dir=parent))
    lock = os.open(path, os.O_RDONLY)
    try:
        # The directory is locked, not a file in it: nothing within has to be told apart from what
        # is kept.
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Only now may others look whether it is locked.
        path = path.rename(parent / path.name.removeprefix("."))
        yield path
    finally:
        _remove(path)
        os.close(lock)


def remove_private(path: Path) -> None:
    """Removes the directory if `private_directory` made it; leaves others alone."""
    if path.name.startswith(_PREFIX):
        _remove(path)


def default_parent() -> Path:
    """Memory where there is a file system for that."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def _remove_abandoned(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*"):
        if not _is_locked(path):
            _remove(path)
    for path in parent.glob(f"{_UNNAMED}*"):
        if not _is_locked(path) and time.time() - path.stat().st_mtime > _UNNAMED_FOR_S:
            _remove(path)


def _remove(path: Path) -> None:
    # Under another name first, so that nobody goes on writing into what is being removed.
    doomed = path.with_name(f"{path.name}-{uuid.uuid4().hex[:8]}")
    with suppress(OSError):  # Another process may be doing the same.
        path = path.rename(doomed)
    shutil.rmtree(path, ignore_errors=True)


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Somebody else's, or just removed.
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False

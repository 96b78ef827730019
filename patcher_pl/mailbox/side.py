"""The snapshots that one side of a mailbox publishes."""

import errno
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from patcher_pl.mailbox.snapshot import Snapshot, SnapshotGoneError, is_distributed, write_snapshot

NUM_KEPT = 2

# Temporaries of another machine, whose processes cannot be asked, count as left behind after this.
# Longer than any snapshot takes to be written, even of a large model over a network.
_ABANDONED_AFTER_S = 3600.0


class Side:
    """Versioned snapshots in one directory: written under a temporary name, then renamed.

    Readers see whole snapshots only. The newest two are kept, so that who has just found one has the
    length of a whole publication to read it; who is slower finds the next one. Where two writers
    publish the same version, the first one wins.

    Args:
        directory: Where the snapshots go; need not exist yet, but its parent must for publishing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def versions(self) -> list[int]:
        """Versions that are there, oldest first."""
        try:
            names = [path.name for path in self.directory.iterdir()]
        except FileNotFoundError:
            return []
        return sorted(int(name) for name in names if name.isdecimal())

    def newest(self) -> Snapshot | None:
        """Returns the newest snapshot, or None where nothing was published."""
        while versions := self.versions():
            try:
                return Snapshot.open(self._path(versions[-1]))
            except SnapshotGoneError:
                continue
        return None

    def fetch(
        self,
        tensors: Mapping[str, Tensor],
        accept: Callable[[Snapshot], bool] = lambda snapshot: True,
    ) -> Snapshot | None:
        """Copies the newest snapshot into `tensors`; goes on to the next where it vanishes.

        Args:
            tensors: Destinations by name, changed in place.
            accept: Whether a snapshot is wanted; asked before any tensor is read.

        Returns:
            What was read, or None where nothing is wanted.

        Raises:
            RuntimeError: If a name is missing or a shape differs.
        """
        while (snapshot := self.newest()) is not None and accept(snapshot):
            try:
                snapshot.load(tensors)
            except SnapshotGoneError:
                continue
            return snapshot
        return None

    def publish(self, version: int, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> bool:
        """Publishes a version and removes all but the newest two; collective in a process group.

        Args:
            version: Number of the version (>= 0); readers take the largest.
            tensors: What is published, by name; sharded tensors as well.
            info: Anything that JSON can say about it.

        Returns:
            Whether it was published; False if that version was there already.

        Raises:
            OSError: What the operating system refused; nothing is left behind.
        """
        self.directory.mkdir(exist_ok=True)  # Without parents: a removed mailbox stays removed.
        temporary = self.directory / _shared(f".{version:08d}.{_writer()}.{uuid.uuid4().hex[:8]}")
        try:
            write_snapshot(temporary, tensors, info)
            return _first_rank_only(lambda: self._reveal(temporary, version))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def clear(self) -> None:
        """Removes every snapshot."""
        for version in self.versions():
            self._remove(version)

    def clean(self) -> None:
        """Removes what writers that are gone have left half-written."""
        for path in self.directory.glob(".*") if self.directory.is_dir() else ():
            if _is_abandoned(path):
                shutil.rmtree(path, ignore_errors=True)

    def _reveal(self, temporary: Path, version: int) -> bool:
        try:
            # The one step in which the version appears, as a whole; POSIX promises that for one
            # file system.
            temporary.rename(self._path(version))
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise
        # After the new one is there: at no moment is there less than one whole snapshot.
        for old in self.versions()[:-NUM_KEPT]:
            self._remove(old)
        return True

    def _remove(self, version: int) -> None:
        # Out of sight in one step: a reader must never find a folder with half of its files.
        retired = self.directory / f".old.{_writer()}.{uuid.uuid4().hex[:8]}"
        try:
            self._path(version).rename(retired)
        except FileNotFoundError:  # Another writer was faster.
            return
        shutil.rmtree(retired, ignore_errors=True)

    def _path(self, version: int) -> Path:
        return self.directory / f"{version:08d}"


def _writer() -> str:
    return f"{socket.gethostname().replace('.', '-')}.{os.getpid()}"


def _is_abandoned(path: Path) -> bool:
    try:
        _, _, host, process, _ = path.name.split(".")
        if host == socket.gethostname().replace(".", "-"):
            return not _is_running(int(process))
        return time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S
    except (ValueError, FileNotFoundError):
        return False


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _shared(name: str) -> str:
    """The name that the first rank chose."""
    if not is_distributed():
        return name
    names = [name]
    dist.broadcast_object_list(names, src=0)
    return names[0]


def _first_rank_only(action: Callable[[], bool]) -> bool:
    """Runs `action` on the first rank; all ranks wait for it and get its answer."""
    if not is_distributed():
        return action()
    answers = [action() if dist.get_rank() == 0 else False]
    dist.broadcast_object_list(answers, src=0)
    return answers[0]

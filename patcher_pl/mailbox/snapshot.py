"""One version of named tensors on a file system, written by torch.distributed.checkpoint."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

INFO = "info.json"


class SnapshotGoneError(Exception):
    """The snapshot was removed while it was read; a newer one has taken its place."""


class Snapshot:
    """A published version; its folder is whole for as long as it exists.

    Args:
        path: Folder of the version.
        version: Its number.
        info: What its writer said about it.
    """

    def __init__(self, path: Path, version: int, info: dict[str, Any]) -> None:
        self.path = path
        self.version = version
        self.info = info

    @classmethod
    def open(cls, path: Path) -> "Snapshot":
        """Reads what its writer said about it, no tensor.

        Raises:
            SnapshotGoneError: If it has been removed meanwhile.
        """
        with _removal_told_apart(path):
            info = json.loads((path / INFO).read_text(encoding="utf-8"))
        return cls(path, int(path.name), info)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the values of the snapshot into `tensors`, in place and by name.

        Tensors may be sharded in another way than those that were written. When this fails, some of
        them may hold new values already.

        Raises:
            SnapshotGoneError: If it has been removed meanwhile.
            RuntimeError: If a name is missing or a shape differs.
        """
        with _removal_told_apart(self.path):
            load(
                dict(tensors),
                storage_reader=FileSystemReader(self.path),
                no_dist=not is_distributed(),
            )


def write_snapshot(folder: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Writes a snapshot into a folder that nobody looks at yet; collective in a process group.

    Raises:
        OSError: What the operating system refused.
    """
    with _unwrapped():
        save(
            dict(tensors),
            storage_writer=FileSystemWriter(folder),
            no_dist=not is_distributed(),
        )
    if not is_distributed() or dist.get_rank() == 0:
        (folder / INFO).write_text(json.dumps(info), encoding="utf-8")


def is_distributed() -> bool:
    """Whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Turns DCP's exception, which no `except Exception` would catch, into what it wraps."""
    try:
        yield
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            raise failure from error
        raise RuntimeError(str(error)) from error


@contextmanager
def _removal_told_apart(path: Path) -> Iterator[None]:
    try:
        with _unwrapped():
            yield
    except Exception as error:
        # The folder is still there: what failed was something else, and must be heard of.
        if path.is_dir():
            raise
        raise SnapshotGoneError(f"{path} was removed while it was read.") from error

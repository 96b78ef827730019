"""How checkpoints lie on the disk: files of one process, folders of several, whole or refused."""

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.load import _METADATA_FILENAME
from torch.distributed.checkpoint.api import CheckpointException

from patcher_pl.errors import CheckpointError, first_line
from patcher_pl.files import write_atomically, write_json

MANIFEST = "manifest.json"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name and renames it once it is on the disk."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Saves `checkpoint`.

        Raises:
            CheckpointError: If the file cannot be written; the one before is untouched.
        """
        try:
            write_atomically(Path(path), lambda temporary: torch.save(checkpoint, temporary))
        except (OSError, RuntimeError) as error:
            raise not_written(path, error) from error

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads a file, or puts the parts in a folder together.

        Raises:
            CheckpointError: If the checkpoint is torn or is none.
        """
        try:
            if Path(path).is_dir():
                return _load_folder(Path(path))
            # A name, where Lightning's default is a function: torch does not take one for tensors of
            # classes of their own, as optimizers with 8 bits keep.
            return super().load_checkpoint(path, map_location, weights_only)
        except _UNREADABLE as error:
            raise _unreadable(path, error) from error


def save_file(trainer: Trainer, path: Path, then: Callable[[], None]) -> None:
    """Saves a run whose first process has everything; all processes must call it.

    Args:
        trainer: Of the run.
        path: The file.
        then: What the first process does once the file is there.

    Raises:
        CheckpointError: On all processes, if it cannot be written; the one before is untouched.
    """
    # As in Trainer.save_checkpoint, but for its barrier, to which a process that failed never came.
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    error = file_error(trainer, checkpoint, path, then)
    agree_on_written(trainer.strategy.reduce_boolean_decision, error, path)


def file_error(
    trainer: Trainer, content: dict[str, Any], path: Path, then: Callable[[], None]
) -> BaseException | None:
    """Why the first process could not write a file; None where it could, and on all others.

    Args:
        trainer: Of the run.
        content: Of the checkpoint.
        path: The file.
        then: What the first process does once the file is there.
    """
    if trainer.is_global_zero:
        try:
            trainer.strategy.checkpoint_io.save_checkpoint(content, path)
            then()
        except (CheckpointError, OSError) as error:
            return error
    return None


def agree_on_written(any_of: Callable[..., bool], error: BaseException | None, path: Path) -> None:
    """Ends with the same outcome on all processes.

    Args:
        any_of: Called as `any_of(failed, all=False)`; whether it failed on any process.
        error: Why this process failed, if it did.
        path: What was to be written.

    Raises:
        CheckpointError: If one of them failed.
    """
    if any_of(error is not None, all=False):
        if isinstance(error, CheckpointError):
            raise error
        raise not_written(path, error or RuntimeError("by another process"))


def save_folder(trainer: Trainer, path: Path, then: Callable[[], None]) -> None:
    """Saves a sharded run: every process writes its parts, then the folder gets its name.

    All processes must call it; the folder must be on a file system that they share.

    Args:
        trainer: Of the run.
        path: The folder.
        then: What the first process does once the folder is there.

    Raises:
        CheckpointError: On all processes, if one of them cannot write; the one before is untouched.
    """
    # As in Trainer.save_checkpoint, but for its barrier, to which a process that failed never came.
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    save = trainer.strategy.save_checkpoint
    error = folder_error(trainer.is_global_zero, lambda to: save(checkpoint, to), path, then)
    agree_on_written(trainer.strategy.reduce_boolean_decision, error, path)


def folder_error(
    first: bool, save: Callable[[Path], None], path: Path, then: Callable[[], None]
) -> BaseException | None:
    """Why one of the processes that write a folder together could not; None where it could.

    Args:
        first: Whether this is the first process, which names the folder when all parts are there.
        save: Writes this process's parts; goes where the first process is told to.
        path: The folder.
        then: What the first process does once the folder is there.
    """

    def write(temporary: Path) -> None:
        save(temporary)
        sizes = {file.name: file.stat().st_size for file in temporary.iterdir()}
        write_json(temporary / MANIFEST, sizes)

    try:
        if first:
            write_atomically(path, write)
            then()
        else:
            save(path)
    except (OSError, RuntimeError, CheckpointException) as raised:
        return raised
    return None


def is_whole(path: Path) -> bool:
    """Whether a checkpoint was written to its end and nothing was cut off since."""
    if not path.is_dir():
        return zipfile.is_zipfile(path)
    try:
        sizes = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def read_entry(path: Path, name: str) -> Any:
    """One entry of a checkpoint of either kind; None where it has none. Weights stay on the disk.

    Raises:
        CheckpointError: If it cannot be read.
    """
    file = path / _METADATA_FILENAME if path.is_dir() else path
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    return content.get(name)


def remove(path: Path) -> None:
    """Deletes a checkpoint of either kind, or a link to one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def not_written(path: str | Path, error: BaseException) -> CheckpointError:
    """The one error of a checkpoint that could not be written."""
    return CheckpointError(
        f"{path}: the checkpoint could not be written ({_first_line(error)}). Make room on the disk "
        "and go on from the previous one with --ckpt_path last."
    )


def _load_folder(path: Path) -> dict[str, Any]:
    from lightning.fabric.utilities.load import _load_distributed_checkpoint

    if not is_whole(path):
        raise RuntimeError("files of it are missing or were cut off")
    return _load_distributed_checkpoint(path)


def _unreadable(path: str | Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{path}: the checkpoint could not be read ({_first_line(error)}). "
        "Give --ckpt_path another one, or leave it away to start from the beginning."
    )


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]  # Of all processes, the first that failed.
    return first_line(error)


_UNREADABLE = (OSError, EOFError, RuntimeError, pickle.UnpicklingError, CheckpointException)

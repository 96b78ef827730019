"""Checkpoints to resume from: written whole, newest ones kept, `last.ckpt` points at the newest."""

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from patcher_pl.defenses import Defense
from patcher_pl.errors import CheckpointError
from patcher_pl.files import write_atomically

LAST = "last.ckpt"


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
            raise CheckpointError(
                f"{path}: the checkpoint could not be written ({error}). Make room on the disk and "
                "go on from the previous one with --ckpt_path last."
            ) from error

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads a checkpoint.

        Raises:
            CheckpointError: If the file is torn or is no checkpoint.
        """
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"{path}: the checkpoint could not be read ({reason}). "
                "Give --ckpt_path another one, or leave it away to start from the beginning."
            ) from error


class RunCheckpoint(Checkpoint):
    """Saves every `every_n_steps` defender steps, at the end of training, and on interruption.

    Args:
        directory: Where checkpoints go, as `step-00000100.ckpt`; `last.ckpt` links to the newest.
        every_n_steps: Defender steps between checkpoints (count, >= 1).
        num_kept: Newest checkpoints that are kept (count, >= 1).

    Raises:
        ValueError: If a value is out of its range.
    """

    def __init__(self, directory: Path, every_n_steps: int = 1000, num_kept: int = 2) -> None:
        super().__init__()
        for name, value in (("every_n_steps", every_n_steps), ("num_kept", num_kept)):
            if value < 1:
                raise ValueError(f"RunCheckpoint.{name} must be >= 1, got {value}.")
        self.directory = Path(directory)
        self.every_n_steps = every_n_steps
        self.num_kept = num_kept
        self._saved_at = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting at the step that was resumed."""
        self._saved_at = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Saves where a checkpoint is due."""
        if trainer.global_step - self._saved_at >= self.every_n_steps:
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the end of training."""
        if trainer.global_step > self._saved_at:
            self.save(trainer, pl_module)

    def save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves now, unless gradients are being accumulated."""
        if isinstance(pl_module, Defense) and not pl_module.is_between_steps:
            return
        path = self.directory / f"step-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        self._saved_at = trainer.global_step
        if trainer.is_global_zero:
            point_last_at(path)
            for old in sorted(self.directory.glob("step-*.ckpt"))[: -self.num_kept]:
                old.unlink(missing_ok=True)


def point_last_at(path: Path) -> None:
    """Makes `last.ckpt` beside `path` a link to it, in one atomic step."""
    write_atomically(path.with_name(LAST), lambda temporary: temporary.symlink_to(path.name))


def find_last(directory: Path) -> Path:
    """Returns the newest checkpoint of a run.

    Raises:
        CheckpointError: If there is none: starting over silently would be worse.
    """
    last = directory / LAST
    if last.exists():
        return last.resolve()
    saved = sorted(directory.glob("step-*.ckpt"))
    if not saved:
        raise CheckpointError(
            f"--ckpt_path last: there is no checkpoint in {directory}. "
            "Check --run_dir, or leave --ckpt_path away to start from the beginning."
        )
    return saved[-1]

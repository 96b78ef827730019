"""Checkpoints to resume from: written whole, newest ones kept, `last.ckpt` points at the newest."""

import logging
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from patcher_pl.callbacks.background_writing import BackgroundWriter
from patcher_pl.callbacks.checkpoint_files import (
    is_whole,
    read_entry,
    remove,
    save_file,
    save_folder,
)
from patcher_pl.defenses import Defense
from patcher_pl.defenses.strategies import shards, uses_fsdp1
from patcher_pl.errors import CheckpointError, ConfigError, RunInterrupted
from patcher_pl.files import write_atomically
from patcher_pl.optim.low_memory import is_of_torchao

LAST = "last.ckpt"

_log = logging.getLogger(__name__)


class RunCheckpoint(Checkpoint):
    """Saves every `every_n_steps` defender steps, at the end of training, and on interruption.

    Checkpoints are called `step-00000100.ckpt`: files, or folders where several processes write one
    together. `last.ckpt` links to the newest. Either is there as a whole or not at all.

    Args:
        directory: Where checkpoints go; on a file system that all processes share.
        every_n_steps: Defender steps between checkpoints (count, >= 1).
        num_kept: Newest checkpoints that are kept (count, >= 1).
        in_background: Write what is saved every `every_n_steps` steps while training goes on, from a
            copy in host memory (of each process's part: weights, optimizer states, attack vectors).
            One at a time: the next one waits for it, and so does the end of the run, however it
            comes. If it cannot be written, the run ends before its next step.

    Raises:
        ValueError: If a value is out of its range.
        ConfigError: In `setup`, if `in_background` cannot be had with the strategy.
        CheckpointError: Where one is saved or waited for, if it could not be written.
    """

    def __init__(
        self,
        directory: Path,
        every_n_steps: int = 1000,
        num_kept: int = 2,
        in_background: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("every_n_steps", every_n_steps), ("num_kept", num_kept)):
            if value < 1:
                raise ValueError(f"RunCheckpoint.{name} must be >= 1, got {value}.")
        self.directory = Path(directory)
        self.every_n_steps = every_n_steps
        self.num_kept = num_kept
        self.in_background = in_background
        self._counted_from = 0
        self._saved_at: int | None = None
        self._writer: BackgroundWriter | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what could not be read again."""
        if self.in_background and uses_fsdp1(trainer):
            raise ConfigError(
                "checkpoint_in_background: FSDPStrategy (FSDP1) cannot write while it trains, got "
                "true. Set it to false, or use ModelParallelStrategy (FSDP2)."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses moments of torchao's optimizers that other processes have saved.

        Torch would leave them in float32 without a word, or fail on one process while another waits.
        """
        path = trainer.ckpt_path
        if path is None or not any(is_of_torchao(one) for one in trainer.optimizers):
            return
        num_before = len(read_entry(Path(path), "defense")["random_states"])
        if num_before != trainer.world_size:
            raise CheckpointError(
                f"--ckpt_path {path}: moments of torchao's optimizers go on with as many processes as "
                f"saved them, {num_before}, got {trainer.world_size}. Use as many, or leave --ckpt_path "
                "away to start from the beginning."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting at the step that was resumed; sweeps up what a killed run left."""
        self._counted_from, self._saved_at = trainer.global_step, None
        if self.in_background:
            self._writer = BackgroundWriter(trainer)
        if trainer.is_global_zero:
            for pattern in (".*.tmp", ".*.old"):
                for leftover in self.directory.glob(pattern):
                    remove(leftover)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Saves where a checkpoint is due."""
        if trainer.global_step - self._counted_from >= self.every_n_steps:
            self._save(trainer, pl_module, self._writer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the end of training."""
        if trainer.global_step > self._counted_from:
            self.save(trainer, pl_module)
        self.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Waits for what is being written; it is the newest that the run can go on from."""
        try:
            self.close()
        except CheckpointError as error:
            # It may be why training ended; any other reason comes first.
            if isinstance(exception, RunInterrupted):
                raise
            _log.error("%s", error)

    def save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves, unless gradients are being accumulated; returns when it is on the disk.

        Raises:
            CheckpointError: If it, or the one before, could not be written.
        """
        self._save(trainer, pl_module, None)

    def wait(self) -> None:
        """Returns once nothing is being written.

        Raises:
            CheckpointError: If what was being written could not be; told once.
        """
        if self._writer is not None:
            self._writer.wait()

    def close(self) -> None:
        """Waits for what is being written, and ends the thread that does it.

        Raises:
            CheckpointError: If it could not be written.
        """
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.wait()
            finally:
                writer.close()

    def _save(
        self, trainer: Trainer, pl_module: LightningModule, writer: BackgroundWriter | None
    ) -> None:
        self.wait()
        if isinstance(pl_module, Defense) and not pl_module.is_between_steps:
            return
        step = trainer.global_step
        if step == self._saved_at:
            return  # A signal came while it was written; there may be little time.
        path = self.directory / f"step-{step:08d}.ckpt"

        def then() -> None:
            point_last_at(path)
            for old in sorted(self.directory.glob("step-*.ckpt"))[: -self.num_kept]:
                remove(old)

        def on_failure() -> None:
            # All processes look at it at the same places.
            if isinstance(pl_module, Defense):
                pl_module.stop_requested = True

        if writer is not None:
            writer.begin(path, then, on_failure)
        elif shards(trainer):
            save_folder(trainer, path, then)
        else:
            save_file(trainer, path, then)
        self._counted_from = self._saved_at = step


def point_last_at(path: Path) -> None:
    """Makes `last.ckpt` beside `path` a link to it, in one atomic step."""
    write_atomically(path.with_name(LAST), lambda temporary: temporary.symlink_to(path.name))


def find_last(directory: Path) -> Path:
    """Returns the newest whole checkpoint of a run; says so where a newer one is torn.

    Raises:
        CheckpointError: If there is none: starting over silently would be worse.
    """
    last = directory / LAST
    saved = sorted(directory.glob("step-*.ckpt"), reverse=True)
    if last.exists():
        pointed_at = last.resolve()
        saved = [pointed_at, *(path for path in saved if path.name != pointed_at.name)]
    for path in saved:
        if is_whole(path):
            return path
        _log.warning("%s is torn; going on from an earlier checkpoint.", path)
    raise CheckpointError(
        f"--ckpt_path last: there is no {'whole ' if saved else ''}checkpoint in {directory}. "
        "Check --run_dir, or leave --ckpt_path away to start from the beginning."
    )

"""Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 end a run between two steps, with a checkpoint."""

import logging
import os
import signal
import subprocess
from types import FrameType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from patcher_pl.callbacks.run_checkpoint import RunCheckpoint
from patcher_pl.defenses import Defense
from patcher_pl.errors import RunInterrupted

_log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class GracefulStop(Callback):
    """Turns the first SIGINT, SIGTERM, SIGUSR1 or SIGUSR2 into a checkpoint and a clean end of the run.

    The handlers only set a flag. It is looked at after every defender step and before every step of
    a simulated attack, where the weights are those of the defender again; there, all processes agree
    on it, whichever of them got the signal. A second Ctrl-C ends the run at once.

    SIGUSR1 is what `sbatch --signal=USR1@300` sends before a job's time is up: the job is put back
    into the queue too. After SIGTERM it is not, since `scancel` sends that; SLURM itself requeues
    what it preempts. SIGUSR2 comes to tasks of `SlurmArray`, which puts them back itself.
    """

    def __init__(self, checkpoint: RunCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.signal: signal.Signals | None = None
        self._module: Defense | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signals."""
        assert isinstance(pl_module, Defense)
        self._module = pl_module
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, self._on_signal)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Ends the run where that was asked for."""
        assert isinstance(pl_module, Defense)
        if pl_module.is_between_steps and pl_module.stop_is_agreed():
            # If that is because it could not be written, it says so.
            self.checkpoint.wait()
            raise RunInterrupted("Stopped between two steps.")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Saves a checkpoint where the run was stopped by a signal."""
        try:
            if isinstance(exception, RunInterrupted):
                self._agree_on_signal(trainer)
                self.checkpoint.save(trainer, pl_module)
                if self.signal == signal.SIGUSR1 and trainer.is_global_zero:
                    requeue_job()
            # A signal must not tear what is being written.
            self.checkpoint.on_exception(trainer, pl_module, exception)
        finally:
            self._give_back()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the signals back, once the end of training is saved."""
        assert isinstance(pl_module, Defense)
        self.checkpoint.on_train_end(trainer, pl_module)
        if pl_module.stop_is_agreed():
            raise RunInterrupted("Stopped after the last step.")
        self._give_back()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        assert self._module is not None
        self._module.stop_requested = True

    def _agree_on_signal(self, trainer: Trainer) -> None:
        own = torch.tensor(self.signal or 0, device=trainer.strategy.root_device)
        highest = int(trainer.strategy.reduce(own, reduce_op="max"))  # type: ignore[arg-type]
        self.signal = signal.Signals(highest or signal.SIGTERM)

    def _give_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()


def requeue_job() -> None:
    """Asks SLURM to run this process's job again later; does nothing outside of one.

    A refusal is logged: the checkpoint is there, and the job can be submitted again by hand.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job is None:
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        _log.warning("SLURM job %s was not requeued: %s", job, error.stderr.strip())
    except OSError as error:
        _log.warning("SLURM job %s was not requeued: %s", job, error)
    else:
        _log.warning("SLURM job %s is requeued.", job)

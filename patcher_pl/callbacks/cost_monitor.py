"""Logs what a run costs."""

import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from patcher_pl.defenses import Defense
from patcher_pl.machine import peak_memory_gib


class CostMonitor(Callback):
    """Logs `cost/gradient_evaluations`, `cost/tokens_per_second` and `cost/peak_memory_gib`.

    Tokens per second count defender and attacker alike, padding excluded, over the time since the
    last logged step, of all processes. Peak memory is the GPU allocator's, or on a CPU the process's
    resident set, of the first process.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._time_s = 0.0
        self._logged_at = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        assert isinstance(pl_module, Defense)
        self._tokens, self._time_s = pl_module.total_tokens(), time.monotonic()
        self._logged_at = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs every `log_every_n_steps` defender steps."""
        assert isinstance(pl_module, Defense)
        step = trainer.global_step
        if step - self._logged_at < trainer.log_every_n_steps or trainer.logger is None:  # type: ignore[attr-defined]
            return
        now, tokens = time.monotonic(), pl_module.total_tokens()
        cost = {
            "cost/gradient_evaluations": float(pl_module.cost.gradient_evaluations),
            "cost/tokens_per_second": (tokens - self._tokens) / max(now - self._time_s, 1e-9),
            "cost/peak_memory_gib": peak_memory_gib(pl_module.device),
        }
        trainer.logger.log_metrics(cost, step=step)
        self._tokens, self._time_s, self._logged_at = tokens, now, step

"""Logs how well a defender and its concurrent attackers keep each other busy."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from patcher_pl.defenses import Defense
from patcher_pl.defenses.attack_source import Concurrent
from patcher_pl.defenses.attack_source.slots import Clocks


class ConcurrencyMonitor(Callback):
    """Logs under `concurrent/`, every `log_every_n_steps` defender steps; nothing without attackers.

    `staleness` (defender steps), `defender_utilization` and `attacker_utilization` (shares of the
    time since the last logged step that were not spent waiting), `overlap_gained_s` (seconds of
    attacking that the defender did not have to wait for, since training started; of several
    attackers together), `wasted_gradient_evaluations` and `restarts`.
    """

    def __init__(self) -> None:
        self._start: Clocks | None = None
        self._last: Clocks | None = None
        self._logged_at = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clocks."""
        source = _source_of(pl_module)
        if source is not None:
            self._start = self._last = source.clocks()
        self._logged_at = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs where it is due."""
        source = _source_of(pl_module)
        if source is None:
            return
        step = trainer.global_step
        if step - self._logged_at < trainer.log_every_n_steps or trainer.logger is None:  # type: ignore[attr-defined]
            return
        self._logged_at = step
        metrics = self._metrics(source, step)
        trainer.logger.log_metrics(
            {f"concurrent/{key}": value for key, value in metrics.items()}, step=step
        )

    def _metrics(self, source: Concurrent, step: int) -> dict[str, float]:
        assert self._start is not None
        assert self._last is not None
        start, last, now = self._start, self._last, source.clocks()
        self._last = now
        waited_s = now.waited_s - last.waited_s
        metrics = {
            # Of the step that was just taken.
            "staleness": float(source.staleness(step - 1)),
            "defender_utilization": 1 - waited_s / max(now.time_s - last.time_s, 1e-9),
            "overlap_gained_s": sum(now.busy_s)
            - sum(start.busy_s)
            - (now.waited_s - start.waited_s),
            "wasted_gradient_evaluations": float(source.num_wasted),
            "restarts": float(source.num_restarts),
        }
        for member, (busy, idle) in enumerate(zip(now.busy_s, now.idle_s, strict=True)):
            busy_s, idle_s = busy - last.busy_s[member], idle - last.idle_s[member]
            if busy_s + idle_s > 0:
                tag = "" if len(now.busy_s) == 1 else f"_{member}"
                metrics[f"attacker_utilization{tag}"] = busy_s / (busy_s + idle_s)
        return metrics


def _source_of(pl_module: LightningModule) -> Concurrent | None:
    source = pl_module.attack_source if isinstance(pl_module, Defense) else None
    return source if isinstance(source, Concurrent) else None

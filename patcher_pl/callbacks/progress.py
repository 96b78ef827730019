"""How far training is: a progress bar on a terminal, lines where there is none."""

from contextlib import ExitStack
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar

from patcher_pl.callbacks.compute_budget import ComputeBudget
from patcher_pl.defenses import Defense
from patcher_pl.progress import ProgressLines, progress_lines


class Progress(RichProgressBar):
    """Shows steps, remaining time and the losses that a defense puts there."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:  # type: ignore[override]
        """Everything but `v_num`, which is the name of the run here."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def _get_train_description(self, current_epoch: int) -> str:
        # Runs are as long as `max_steps`; Lightning would count epochs towards minus two.
        return f"Epoch {current_epoch}"


class ProgressLog(Callback):
    """Writes a line every half a minute where there is no terminal, also during a long step.

    It counts defender steps; gradient evaluations in a run that ends by those alone. Tokens count
    defender and attacker alike, of the first process.
    """

    def __init__(self) -> None:
        self._open = ExitStack()
        self._lines: ProgressLines | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the lines."""
        assert isinstance(pl_module, Defense)
        if not trainer.is_global_zero:
            return
        budget = _budget(trainer, pl_module)
        unit = "defender steps" if budget is None else "gradient evaluations"
        lines = progress_lines(
            f"{pl_module.name}, {unit}",
            _num_steps(trainer, pl_module) if budget is None else budget,
            first=_done(trainer, pl_module),
            num_tokens=pl_module.cost.tokens,
        )
        self._lines = self._open.enter_context(lines)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Takes down how far the run is."""
        assert isinstance(pl_module, Defense)
        if self._lines is not None:
            loss = None
            if self._lines.wants_loss:
                loss = trainer.progress_bar_metrics.get("train/loss_safe")
            done, num_tokens = _done(trainer, pl_module), pl_module.cost.tokens
            self._lines.update(done, loss=loss, num_tokens=num_tokens)  # type: ignore[arg-type]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the lines."""
        self._open.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Ends the lines."""
        self._open.close()


def _budget(trainer: Trainer, defense: Defense) -> int | None:
    """Gradient evaluations that the run ends with; None where it ends by steps or epochs."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ComputeBudget) and _num_steps(trainer, defense) is None:
            return callback.max_gradient_evaluations
    return None


def _num_steps(trainer: Trainer, defense: Defense) -> float | None:
    limits: list[float] = [trainer.max_steps] if trainer.max_steps > -1 else []
    if trainer.max_epochs is not None and trainer.max_epochs > -1:
        num_batches = trainer.max_epochs * trainer.num_training_batches
        limits.append(num_batches / defense.accumulate_grad_batches)
    total = min(limits, default=float("inf"))
    return total if total < float("inf") else None


def _done(trainer: Trainer, defense: Defense) -> int:
    is_budget = _budget(trainer, defense) is not None
    return defense.cost.gradient_evaluations if is_budget else trainer.global_step

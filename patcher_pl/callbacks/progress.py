"""Lightning's progress bar without the version number of the logger."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


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

"""Ends training by what it costs instead of by steps."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from patcher_pl.defenses import Defense


class ComputeBudget(Callback):
    """Ends training after the first defender step that reaches a number of gradient evaluations.

    The last step may go beyond it, by at most its own cost (with a fresh attack in it, that is the
    attack's); what a run took is in its results. Counted as in `cost/gradient_evaluations`.

    Args:
        max_gradient_evaluations: Forward-backward passes, those of simulated attacks included
            (count, >= 1).

    Raises:
        ValueError: If it is below 1.
    """

    def __init__(self, max_gradient_evaluations: int) -> None:
        if max_gradient_evaluations < 1:
            raise ValueError(
                "ComputeBudget.max_gradient_evaluations must be >= 1, got "
                f"{max_gradient_evaluations}. Use null for no limit."
            )
        self.max_gradient_evaluations = max_gradient_evaluations

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes no step more in a run that is resumed at its end."""
        self._stop_if_spent(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Ends training where the budget is spent."""
        self._stop_if_spent(trainer, pl_module)

    def _stop_if_spent(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Defense)
        spent = pl_module.cost.gradient_evaluations >= self.max_gradient_evaluations
        if spent and pl_module.is_between_steps:
            trainer.should_stop = True

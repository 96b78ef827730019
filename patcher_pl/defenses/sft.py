"""Supervised fine-tuning on safe conversations: the control of every experiment."""

from collections.abc import Mapping

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from patcher_pl.defenses.base import Defense
from patcher_pl.losses import first_order_loss
from patcher_pl.models import LanguageModel
from patcher_pl.types import Batch


class SFT(Defense):
    """Minimizes L_safe(theta) and does nothing against attacks.

    As a control it gets as many gradient evaluations as the defense it is compared with.

    One gradient evaluation per batch. Works on sharded weights: the gradient is a mean over batches.

    Args:
        language_model: The model to align.
        optimizer: Builds the optimizer from the parameters; AdamW with lr 1e-5 unless given, the
            rate of the Patcher paper.
        scheduler: Builds a learning-rate schedule from the optimizer; None keeps it constant.
        max_grad_norm: Global gradient norm to clip to; None leaves gradients as they are. 1 as in
            the Patcher paper.
        accumulate_grad_batches: Batches whose mean loss makes one step (count, >= 1).

    Raises:
        ValueError: If a value is out of its range.

    References:
        Defaults are those of `Patcher`, https://arxiv.org/abs/2606.07970, to compare with it.
    """

    supports_packing = True

    def __init__(
        self,
        language_model: LanguageModel,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5),
        scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        accumulate_grad_batches: int = 1,
    ) -> None:
        super().__init__(
            language_model, optimizer, scheduler, max_grad_norm, accumulate_grad_batches
        )

    def add_gradients(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """Adds the gradient of L_safe(theta)."""
        loss = first_order_loss(self.model, batch)
        self.backward_of(share * loss, batch)
        return {"loss_safe": loss.detach()}

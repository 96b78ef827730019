"""Supervised fine-tuning on safe conversations: the control of every experiment."""

from collections.abc import Mapping

from torch import Tensor

from patcher_pl.defenses.base import Defense
from patcher_pl.losses import causal_lm_loss
from patcher_pl.types import Batch


class SFT(Defense):
    """Minimizes L_safe(theta) and does nothing against attacks.

    As a control it gets as many gradient evaluations as the defense it is compared with.

    One gradient evaluation per batch. Works on sharded weights: the gradient is a mean over batches.

    References:
        Defaults are those of `Patcher`, https://arxiv.org/abs/2606.07970, to compare with it.
    """

    supports_packing = True

    def add_gradients(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """Adds the gradient of L_safe(theta)."""
        loss = causal_lm_loss(self.model, batch)
        self.backward_of(share * loss, batch)
        return {"loss_safe": loss.detach()}

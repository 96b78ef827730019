"""Booster: makes a step on harmful data lower the harmful loss by less."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from patcher_pl.defenses.base import Defense
from patcher_pl.losses import differentiable_loss
from patcher_pl.models import LanguageModel
from patcher_pl.randomness import RandomState, kept_random_state
from patcher_pl.types import HALF_PRECISION, Batch
from patcher_pl.validation import require

logger = logging.getLogger(__name__)


class Booster(Defense):
    """Minimizes the safe loss and what one normalized step on harmful data gains.

        min over w of  f(w) + lam [h(w) - h(w')],      w' = w - alpha grad h(w) / ||grad h(w)||

    f is the loss on safe, h that on harmful conversations. Second derivatives are left out, as in
    the paper, so that a batch adds

        grad f(w) + lam [grad h(w) - grad h(w')]

    w is what is trained: every weight, or the adapters. The paper trains adapters, its script at a
    constant lr of 5e-4. Dropout falls the
    same way in both passes over the harmful batch, which the authors' code leaves to chance.

    Three gradient evaluations per batch. Works on sharded weights; every process takes harmful
    conversations of its own, and the step is that of all of them together.

    Args:
        language_model: The model to harden.
        lam: Weight of the gained harmful loss, lambda (>= 0); 5 in Booster's script, also 25 in
            tables.
        alpha: Length of the step on harmful data (> 0); 0.1 in Booster's script.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Huang et al., 2024, https://arxiv.org/abs/2409.01586, the objective and its
        first-order update, algorithm 1; defaults from git-disl/Booster, script/alignment/smooth_align.sh.
    """

    supports_packing = True
    needs_attack_data = True

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        lam: float = 5.0,
        alpha: float = 0.1,
        **common: Any,
    ) -> None:
        super().__init__(language_model, **common)
        self.lam = lam
        self.alpha = alpha
        require(self, lam >= 0, "lam", ">= 0", "Use SFT for a model without this term.")
        require(self, alpha > 0, "alpha", "> 0", "The authors use 0.1.")

    def on_fit_start(self) -> None:
        """Warns of half precision."""
        super().on_fit_start()
        if self.trained_weights.parameters[0].dtype in HALF_PRECISION:
            logger.warning(
                "Booster looks at the harmful loss a small step further, which in half precision is "
                "mostly lost to rounding. Use `language_model.dtype: float32`, and `trainer.precision` "
                "`32-true` or `bf16-mixed`."
            )

    def add_gradients(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """Adds grad f(w) + lam [grad h(w) - grad h(w')]."""
        loss_safe = differentiable_loss(self.model, batch)
        self.backward_of(share * loss_safe, batch)

        weights, device = self.trained_weights, self.trained_weights.shards.device
        harmful = self.step.next_harmful_batch()
        loss_of_harmful = partial(differentiable_loss, self.model, harmful)
        dropout = RandomState.capture(device)
        here, loss_here = self.step.gradients_of(loss_of_harmful, harmful)
        norm = float(weights.shards.norm(here))
        shift = [gradient * (-self.alpha / norm if norm else 0.0) for gradient in here]
        with kept_random_state(device), weights.shifted(shift):
            dropout.restore()
            there, loss_there = self.step.gradients_of(loss_of_harmful, harmful)
        differences = [before - after for before, after in zip(here, there, strict=True)]
        weights.shards.add_to_gradients(differences, share * self.lam)
        return {
            "loss_safe": loss_safe.detach(),
            "loss_harmful": loss_here,
            "loss_harmful_stepped": loss_there,
            "harmful_gain": loss_here - loss_there,
        }

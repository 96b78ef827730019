"""Booster: makes a step on harmful data lower the harmful loss by less."""

from collections.abc import Mapping
from functools import partial

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from patcher_pl.defenses.base import Defense
from patcher_pl.defenses.harmful_data import gradients_of, next_harmful_batch, require_attack_data
from patcher_pl.losses import causal_lm_loss
from patcher_pl.models import LanguageModel
from patcher_pl.randomness import RandomState, kept_random_state
from patcher_pl.types import Batch


class Booster(Defense):
    """Minimizes the safe loss and what one normalized step on harmful data gains.

        min over w of  f(w) + lam [h(w) - h(w')],      w' = w - alpha grad h(w) / ||grad h(w)||

    f is the loss on safe, h that on harmful conversations. Second derivatives are left out, as in
    the paper, so that a batch adds

        grad f(w) + lam [grad h(w) - grad h(w')]

    w is what is trained: every weight, or the adapters. The paper trains adapters. Dropout falls the
    same way in both passes over the harmful batch, which the authors' code leaves to chance.

    Three gradient evaluations per batch. Works on sharded weights; every process takes harmful
    conversations of its own, and the step is that of all of them together.

    Args:
        language_model: The model to harden.
        optimizer: Builds the optimizer from the parameters; AdamW with lr 1e-5 unless given, the
            rate of the Patcher paper, which trains every weight. Booster's script: 5e-4 for adapters.
        scheduler: Builds a learning-rate schedule from the optimizer; None keeps it constant, as
            Booster's script does.
        lam: Weight of the gained harmful loss, lambda (>= 0); 5 in Booster's script, also 25 in
            tables.
        alpha: Length of the step on harmful data (> 0); 0.1 in Booster's script.
        max_grad_norm: Global gradient norm to clip to; None leaves gradients as they are. 1 is what
            the Trainer of transformers, which Booster's script uses, clips to.
        accumulate_grad_batches: Batches whose mean loss makes one step (count, >= 1).

    Raises:
        ValueError: If a value is out of its range.

    References:
        Huang et al., 2024, https://arxiv.org/abs/2409.01586, the objective and its
        first-order update, algorithm 1; defaults from git-disl/Booster, script/alignment/smooth_align.sh.
    """

    supports_packing = True

    def __init__(
        self,
        language_model: LanguageModel,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5),
        scheduler: LRSchedulerCallable | None = None,
        lam: float = 5.0,
        alpha: float = 0.1,
        max_grad_norm: float | None = 1.0,
        accumulate_grad_batches: int = 1,
    ) -> None:
        super().__init__(
            language_model, optimizer, scheduler, max_grad_norm, accumulate_grad_batches
        )
        self._require(lam >= 0, "lam", ">= 0", lam, "Use SFT for a model without this term.")
        self._require(alpha > 0, "alpha", "> 0", alpha, "The authors use 0.1.")
        self.lam = lam
        self.alpha = alpha

    def on_fit_start(self) -> None:
        """Refuses to start without harmful conversations."""
        super().on_fit_start()
        require_attack_data(self)

    def add_gradients(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """Adds grad f(w) + lam [grad h(w) - grad h(w')]."""
        loss_safe = causal_lm_loss(self.model, batch)
        self.backward_of(share * loss_safe, batch)

        device = self.weights.shards.device
        harmful = next_harmful_batch(self, device)
        loss_of_harmful = partial(causal_lm_loss, self.model, harmful)
        dropout = RandomState.capture(device)
        here, loss_here = gradients_of(self, self.weights, loss_of_harmful, harmful)
        norm = float(self.weights.shards.norm(here))
        step = [gradient * (-self.alpha / norm if norm else 0.0) for gradient in here]
        with kept_random_state(device), self.weights.shifted(step):
            dropout.restore()
            there, loss_there = gradients_of(self, self.weights, loss_of_harmful, harmful)
        differences = [before - after for before, after in zip(here, there, strict=True)]
        self.weights.shards.add_to_gradients(differences, share * self.lam)
        return {
            "loss_safe": loss_safe.detach(),
            "loss_harmful": loss_here,
            "loss_harmful_stepped": loss_there,
            "harmful_gain": loss_here - loss_there,
        }

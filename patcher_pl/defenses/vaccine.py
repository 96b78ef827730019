"""Vaccine: keeps hidden embeddings on safe conversations where they are when they are perturbed."""

from collections.abc import Mapping

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from patcher_pl.defenses.base import Defense
from patcher_pl.defenses.perturbation import add_perturbed_gradients
from patcher_pl.models import LanguageModel
from patcher_pl.models.blocks import attention_of, blocks_of
from patcher_pl.types import Batch


class Vaccine(Defense):
    """Minimizes the safe loss under the worst perturbation of the hidden embeddings.

        min over w of  max over ||(eps_1, ..., eps_L)|| <= rho of  L_safe(w; e_l + eps_l)

    e_l is the output of the attention in layer l, as in the authors' code. To first order, the worst
    perturbation of a batch is

        eps_l = rho g_l / ||(g_1, ..., g_L)||,      g_l = d L_safe / d e_l

    so one pass finds it, and the gradient by the weights comes from a second pass over the same
    batch. The norm is that of all layers, rows and positions of the batch together, as in the authors'
    code (which adds 1e-7 to it). With accumulation, every batch has a perturbation of its own.

    Two gradient evaluations per batch. Needs no harmful conversations. The paper trains adapters
    (set `language_model.lora`), the Patcher paper every weight. Works on sharded weights, adapters
    aside; the norm is then that of the batches of all processes.

    Args:
        language_model: The model to align.
        optimizer: Builds the optimizer from the parameters; AdamW with lr 1e-5 unless given, the
            rate of the Patcher paper, which trains every weight. Vaccine's script: 1e-3 for adapters,
            with weight decay 0.1.
        scheduler: Builds a learning-rate schedule from the optimizer; None keeps it constant.
            Vaccine's script: a cosine with 10 % warm-up.
        rho: Length of the perturbation of a batch (>= 0); 2 in Vaccine's README, 5 where Booster's
            scripts compare with it. Depends on the size of a model and its batches: sweep it.
        max_grad_norm: Global gradient norm to clip to; None leaves gradients as they are. 1 is what
            the Trainer of transformers, which Vaccine's script uses, clips to.
        accumulate_grad_batches: Batches whose mean loss makes one step (count, >= 1).

    Raises:
        ValueError: If a value is out of its range.
        ConfigError: When training starts, if the model has no such layers.

    References:
        Huang et al., 2024, https://arxiv.org/abs/2402.01109: the min-max problem, its closed-form
        perturbation, and algorithm 1; defaults from git-disl/Vaccine.
    """

    supports_packing = True

    def __init__(
        self,
        language_model: LanguageModel,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5),
        scheduler: LRSchedulerCallable | None = None,
        rho: float = 2.0,
        max_grad_norm: float | None = 1.0,
        accumulate_grad_batches: int = 1,
    ) -> None:
        super().__init__(
            language_model, optimizer, scheduler, max_grad_norm, accumulate_grad_batches
        )
        self._require(rho >= 0, "rho", ">= 0", rho, "Use SFT for a model without perturbations.")
        self.rho = rho
        self._attention: list[nn.Module] = []

    def on_fit_start(self) -> None:
        """Finds the attention of every layer."""
        super().on_fit_start()
        self._attention = [attention_of(block) for block in blocks_of(self.model)]

    def release(self) -> None:
        """Lets go of the weights."""
        super().release()
        self._attention = []

    def add_gradients(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """Adds the gradient of L_safe(w; e + eps)."""
        return add_perturbed_gradients(self, self._attention, self.rho, batch, share)

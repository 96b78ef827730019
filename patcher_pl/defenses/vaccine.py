"""Vaccine: keeps hidden embeddings on safe conversations where they are when they are perturbed."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from patcher_pl.defenses.base import Defense
from patcher_pl.defenses.perturbation import add_perturbed_gradients
from patcher_pl.models import LanguageModel
from patcher_pl.models.blocks import attention_of
from patcher_pl.types import Batch
from patcher_pl.validation import require


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
    (set `language_model.lora`), its script at lr 1e-3, with weight decay 0.1 and a cosine with 10 %
    warm-up; the Patcher paper trains every weight. Works on sharded weights, adapters
    aside; the norm is then that of the batches of all processes.

    Args:
        language_model: The model to align.
        rho: Length of the perturbation of a batch (>= 0); 2 in Vaccine's README, 5 where Booster's
            scripts compare with it. Depends on the size of a model and its batches: sweep it.

    Raises:
        ValueError: If a value is out of its range.
        ConfigError: When training starts, if the model has no such layers.

    References:
        Huang et al., 2024, https://arxiv.org/abs/2402.01109: the min-max problem, its closed-form
        perturbation, and algorithm 1; defaults from git-disl/Vaccine.
    """

    supports_packing = True
    reads_layers = True

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        rho: float = 2.0,
        **common: Any,
    ) -> None:
        super().__init__(language_model, **common)
        self.rho = rho
        require(self, rho >= 0, "rho", ">= 0", "Use SFT for a model without perturbations.")

    def add_gradients(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """Adds the gradient of L_safe(w; e + eps)."""
        attention = [attention_of(block) for block in self.blocks]
        return add_perturbed_gradients(self.step, attention, self.rho, batch, share)

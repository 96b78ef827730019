"""T-Vaccine: Vaccine on the layers that harmful conversations pull at most."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from patcher_pl.defenses.base import Defense
from patcher_pl.defenses.perturbation import add_perturbed_gradients, norms_of, output_gradients
from patcher_pl.defenses.strategies import OneDevice
from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.models import LanguageModel
from patcher_pl.models.blocks import attention_of
from patcher_pl.types import Batch
from patcher_pl.validation import require


class TVaccine(Defense):
    """Minimizes the safe loss under the worst perturbation of the embeddings of a few layers.

    A layer is taken to matter for safety as far as harmful conversations pull at it:

        p_l = ||d L_harmful / d e_l|| / sum over k of ||d L_harmful / d e_k||

    with e_l the output of the attention in layer l. Every `resample_every` steps, `num_layers` layers
    are drawn by p without replacement, as a function of seed and step. Until the next draw, steps are
    those of `Vaccine` with the perturbation eps_l = rho g_l / ||(g_k of all drawn k)|| on these alone.
    All other layers are frozen meanwhile: the optimizer does not touch them, not even by weight decay.

    Two gradient evaluations per batch, and one on harmful conversations per `measure_every` steps,
    when p is logged under `layers/`. T-Vaccine's script trains adapters at lr 1e-3, with weight decay 0.1
    and a cosine with 10 % warm-up. Needs one device: see `require_shardable`.

    Args:
        language_model: The model to align.
        rho: Length of the perturbation of a batch (>= 0); 3 in T-Vaccine's paper.
        num_layers: Layers that are perturbed at a time, S (count, from 1 to all of the model); 8 in
            T-Vaccine's script, of 32.
        resample_every: Steps with the same layers, J (count, >= 1); 20 in T-Vaccine's script.
        measure_every: Steps with the same p, K (count, >= 1); 200 in T-Vaccine's script. Measured on
            the next batch of the attack data; the authors' code takes one conversation.
        freeze_others: Freeze the layers that were not drawn, as the paper says. Embeddings, last norm
            and output head, which are in no layer, are trained as ever; so are feed-forward adapters
            of frozen layers in the authors' code, but not here. Off, every layer is trained.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Liu et al., 2024, https://arxiv.org/abs/2410.09760: layers by harmful gradient norm, and the
        perturbation of those drawn; defaults from Lslland/T-Vaccine, script/alignment/T-Vaccine.sh.
        The perturbation is that of Vaccine, https://arxiv.org/abs/2402.01109.
    """

    short_name = "t_vaccine"
    supports_packing = True
    needs_attack_data = True
    reads_layers = True
    one_device = OneDevice(
        why="every process would draw layers of its own, and weights are gathered whether they are "
        "frozen or not",
        instead="Vaccine",
    )

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        rho: float = 3.0,
        num_layers: int = 8,
        resample_every: int = 20,
        measure_every: int = 200,
        freeze_others: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(language_model, **common)
        self.rho = rho
        self.num_layers = num_layers
        self.resample_every = resample_every
        self.measure_every = measure_every
        self.freeze_others = freeze_others
        require(self, rho >= 0, "rho", ">= 0", "Use SFT for a model without perturbations.")
        for field in ("num_layers", "resample_every", "measure_every"):
            remedy = "Use 1 for the least there can be."
            require(self, getattr(self, field) >= 1, field, ">= 1", remedy)
        self.probabilities: list[float] = []
        self.drawn: list[int] = []

    def on_fit_start(self) -> None:
        """Refuses to draw more layers than the model has.

        Raises:
            ConfigError: If that was asked for.
        """
        super().on_fit_start()
        if self.num_layers > len(self.blocks):
            raise ConfigError(
                f"TVaccine.num_layers must be <= {len(self.blocks)}, the layers of the model, got "
                f"{self.num_layers}. Set `num_layers`: the paper draws a quarter of them."
            )

    def before_step(self) -> None:
        """Measures how harmful conversations pull at the layers, and draws some, where it is due."""
        if self.global_step % self.measure_every == 0 or not self.probabilities:
            self._measure()
        if self.global_step % self.resample_every == 0 or not self.drawn:
            self._draw()

    def add_gradients(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """Adds the gradient of L_safe(w; e + eps) by what is not frozen."""
        attention = [attention_of(self.blocks[layer]) for layer in self.drawn]
        with self._others_frozen():
            return add_perturbed_gradients(self.step, attention, self.rho, batch, share)

    def _measure(self) -> None:
        harmful = self.step.next_harmful_batch()
        attention = [attention_of(block) for block in self.blocks]
        gradients, loss = output_gradients(self.step, attention, harmful)
        norms = norms_of(gradients).double()
        total = norms.sum()
        if not (torch.isfinite(total) and total > 0):
            raise PatcherError(
                f"TVaccine found no harmful gradients at defender step {self.global_step} (sum of "
                f"their norms: {float(total)}). Look at `data.attack`, or lower the learning rate."
            )
        self.probabilities = [float(share) for share in norms / total]
        shares = {f"layers/p_{layer}": share for layer, share in enumerate(self.probabilities)}
        self.log_now({"train/loss_harmful": float(loss), **shares})

    def _draw(self) -> None:
        generator = torch.Generator().manual_seed(self.step.seed_of("layers", self.global_step))
        # As many as are asked for, even where only some have a gradient.
        weights = torch.tensor(self.probabilities, dtype=torch.float64).clamp_min(1e-12)
        picked = torch.multinomial(weights, self.num_layers, generator=generator)
        self.drawn = sorted({int(layer) for layer in picked})

    @contextmanager
    def _others_frozen(self) -> Iterator[None]:
        others = {
            parameter
            for layer, block in enumerate(self.blocks)
            if self.freeze_others and layer not in self.drawn
            for parameter in block.parameters()
            if parameter.requires_grad
        }
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the layers in use, so that a run goes on between two draws."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["defense"]["probabilities"] = self.probabilities
        checkpoint["defense"]["drawn"] = self.drawn

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the layers of the run."""
        super().on_load_checkpoint(checkpoint)
        self.probabilities = list(checkpoint["defense"]["probabilities"])
        self.drawn = list(checkpoint["defense"]["drawn"])

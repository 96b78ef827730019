"""RepNoise: turns what a model represents of harmful answers into noise, in every layer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from patcher_pl.defenses.base import Defense
from patcher_pl.defenses.layers import OUTSIDE_OF_FORWARD, layer_losses
from patcher_pl.defenses.strategies import OneDevice
from patcher_pl.losses import answer_cross_entropy, differentiable_loss, maximum_mean_discrepancy
from patcher_pl.losses.causal_lm import model_inputs
from patcher_pl.models import LanguageModel
from patcher_pl.models.blocks import feed_forward_of
from patcher_pl.types import IGNORE_INDEX, Batch
from patcher_pl.validation import require


class RepNoise(Defense):
    """Minimizes the safe loss while the layers forget harmful answers.

        L_safe + beta mean over l of MMD(h_l, N(0, I)) - alpha log(1 + mean over l of CE_l)

    h_l is the output of the feed-forward network of layer l at the tokens of harmful answers, zero
    elsewhere, one long vector per conversation; its counterpart is noise at the same places, fresh
    for every layer and batch (a function of the seed and the batch's place in the attack data). CE_l
    is the loss of the harmful answers as read from layer l through the last norm and the output head,
    for the last layer the model's own.

    From the authors' code this differs in two ways: their pairs of a harmful and a harmless answer
    to one prompt are not needed, so that the tokens of an answer stand for those in which a pair
    differs; and the mean over CE_l counts every layer once, where they add the embeddings and count
    the last layer twice.

    Two gradient evaluations per batch, one of them on harmful conversations. Logits of one layer at a
    time are in memory. Needs one device: see `require_shardable`.

    Args:
        language_model: The model to harden.
        alpha: Weight of the harmful loss, which is driven up (>= 0); 1 in RepNoise's code.
        beta: Weight of the noise (>= 0); 1e-3 in RepNoise's code. Its README asks for a search over
            rate, alpha and beta.
        num_kernels: Gaussian kernels of the discrepancy (count, >= 1); 5 in RepNoise's code.
        kernel_factor: Ratio of the widths of neighboring kernels (> 1); 2 in RepNoise's code.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Rosati et al., 2024, https://arxiv.org/abs/2405.14577: the loss of stability, noise and ascent;
        defaults from domenicrosati/representation-noising, representation_noising/loss.py.
    """

    needs_attack_data = True
    reads_layers = True
    one_device = OneDevice(why=OUTSIDE_OF_FORWARD, instead="Vaccine")

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        alpha: float = 1.0,
        beta: float = 1e-3,
        num_kernels: int = 5,
        kernel_factor: float = 2.0,
        **common: Any,
    ) -> None:
        super().__init__(language_model, **common)
        self.alpha = alpha
        self.beta = beta
        self.num_kernels = num_kernels
        self.kernel_factor = kernel_factor
        require(self, alpha >= 0, "alpha", ">= 0", "Use 0 to leave this term away.")
        require(self, beta >= 0, "beta", ">= 0", "Use 0 to leave this term away.")
        require(self, num_kernels >= 1, "num_kernels", ">= 1", "The authors use 5.")
        require(self, kernel_factor > 1, "kernel_factor", "> 1", "The authors use 2.")

    def add_gradients(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """Adds the gradients of all three terms."""
        loss_safe = differentiable_loss(self.model, batch)
        self.backward_of(share * loss_safe, batch)
        harmful = self.step.next_harmful_batch()
        noise, by_layer = self._harmful_losses(harmful)
        loss_layers = torch.stack(by_layer).mean()
        ascent = torch.log1p(loss_layers)
        self.backward_of(share * (self.beta * noise - self.alpha * ascent), harmful)
        return {
            "loss_safe": loss_safe.detach(),
            "loss_noise": noise.detach(),
            "loss_harmful": by_layer[-1].detach(),
            "loss_harmful_layers": loss_layers.detach(),
        }

    def _harmful_losses(self, harmful: Batch) -> tuple[Tensor, list[Tensor]]:
        """Returns the mean discrepancy from noise, and CE_l for every layer."""
        blocks = self.blocks
        feed_forward = [feed_forward_of(block) for block in blocks]
        with _recorded([*blocks, *feed_forward]) as outputs:
            logits = self.model(**model_inputs(harmful)).logits
            # Copied, since hooks of a later pass would write into the same dictionary.
            recorded = dict(outputs)
        labels = harmful["labels"]
        by_layer = layer_losses(self.model, [recorded[block] for block in blocks[:-1]], labels)
        # The last layer's own logits are there already; through norm and head once more they would
        # be the same.
        by_layer.append(answer_cross_entropy(logits, labels))
        is_answer = (labels != IGNORE_INDEX).unsqueeze(-1)
        generator = self._generator(labels.device)
        discrepancies = [
            self._from_noise(recorded[one], is_answer, generator) for one in feed_forward
        ]
        return torch.stack(discrepancies).mean(), by_layer

    def _generator(self, device: torch.device) -> torch.Generator:
        # By place instead of by state, so that a resumed run sees the same noise.
        seed = self.step.seed_of("noise", self.step.attack_stream.position)
        return torch.Generator(device).manual_seed(seed)

    def _from_noise(self, hidden: Tensor, is_answer: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(
            hidden.shape, generator=generator, device=hidden.device, dtype=hidden.dtype
        )
        return maximum_mean_discrepancy(
            (hidden * is_answer).flatten(1),
            (noise * is_answer).flatten(1),
            num_kernels=self.num_kernels,
            kernel_factor=self.kernel_factor,
        )


@contextmanager
def _recorded(modules: list[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Keeps what modules put out in the forward pass of the block; of a tuple, the first."""
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        outputs[module] = output[0] if isinstance(output, tuple) else output

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()

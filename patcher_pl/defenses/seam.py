"""SEAM: a self-destructive model, whose harmful and benign gradients oppose each other."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from patcher_pl.data import Mixture, SafetyDataModule
from patcher_pl.defenses.base import Defense
from patcher_pl.defenses.layers import OUTSIDE_OF_FORWARD, layer_losses
from patcher_pl.defenses.step import Step
from patcher_pl.defenses.strategies import OneDevice
from patcher_pl.losses import answer_cross_entropy, differentiable_loss
from patcher_pl.losses.retained import outputs_of
from patcher_pl.models import LanguageModel
from patcher_pl.randomness import RandomState, kept_random_state
from patcher_pl.types import Batch, move_batch
from patcher_pl.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class Seam(Defense):
    """Couples harmful to benign capability: learning the one makes the model lose the other.

        L = -log(1 + mean over layers CE_harm) + alpha CE_refusal + beta cos(g_adv, g_benign)

    CE_harm is the cross-entropy of harmful answers as read off each layer (embeddings included)
    through the final norm and the output head. g_adv and g_benign are the gradients of the
    cross-entropy on harmful and on benign conversations. With unit vectors a and b along them and
    c = a . b, the gradient of the cosine is taken by one-sided differences:

        [g_adv(theta + eps (b - c a)) - g_adv] / (eps ||g_adv||)
            + [g_benign(theta + eps (a - c b)) - g_benign] / (eps ||g_benign||)

    theta is what is trained: every weight, or the adapters. Dropout falls the same way in both
    passes of a difference.

    Where the authors' code differs: it counts the output layer once more, and applies the final norm
    to the last layer twice.

    Six gradient evaluations per batch, five without `benign`. SEAM's config has a cosine schedule with
    10 % warm-up. Differences of gradients need full
    precision: in bfloat16 they are mostly noise (a warning says so; the authors' script uses it).
    Needs one device: see `require_shardable`.

    Args:
        language_model: The model to harden.
        benign: Benign conversations for g_benign, in batches as large as the attacker's. None takes
            the safe batch of the step, refusals in it included; its gradient is then computed once.
        optimizer: Builds the optimizer from the parameters; AdamW with lr 2e-5 and no weight decay,
            SEAM's config, unless given.
        alpha: Weight of the refusals' loss (>= 0); 1 in SEAM's config.
        beta: Weight of the cosine (>= 0); 0.01 in SEAM's config.
        epsilon: Length of a shift along a direction of unit scale (> 0); 1e-3 in SEAM's config.
        max_grad_norm: Global gradient norm to clip to; None, as SEAM's config, leaves gradients as
            they are.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Wang et al., 2025, https://arxiv.org/abs/2505.12186, the three losses and the
        Hessian-free estimate of the last one; defaults from ZJUWYH/seam, config/train.yaml.
    """

    needs_attack_data = True
    reads_layers = True
    one_device = OneDevice(why=OUTSIDE_OF_FORWARD, instead="Booster")

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        benign: Mixture | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(
            params, lr=2e-5, weight_decay=0.0
        ),
        alpha: float = 1.0,
        beta: float = 0.01,
        epsilon: float = 1e-3,
        max_grad_norm: float | None = None,
        **common: Any,
    ) -> None:
        super().__init__(language_model, optimizer=optimizer, max_grad_norm=max_grad_norm, **common)
        self.benign = benign
        self.alpha = alpha
        self.beta = beta
        self.epsilon = epsilon
        require(self, alpha >= 0, "alpha", ">= 0", "Use 0 to leave the refusals out.")
        require(self, beta >= 0, "beta", ">= 0", "Use 0 to leave the cosine out.")
        require(self, epsilon > 0, "epsilon", "> 0", "The authors use 1e-3.")
        self._benign_data: SafetyDataModule | None = None

    def on_fit_start(self) -> None:
        """Warns of half precision."""
        super().on_fit_start()
        dtype = next(self.model.parameters()).dtype
        if dtype == torch.bfloat16 or "bf16" in str(self.trainer.precision):
            logger.warning(
                "Seam takes differences of gradients, which in bfloat16 are mostly noise. Use "
                "`trainer.precision: 32-true` and `language_model.dtype: float32`."
            )

    def on_train_start(self) -> None:
        """Begins the benign stream where the harmful one is: a batch takes one of each."""
        super().on_train_start()
        if self.benign is not None:
            data: SafetyDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
            self._benign_data = data.with_attack(self.benign)
            # Its own position is then never saved: a resumed run finds it by the harmful one.
            self._benign_data.attack_stream().load_state_dict(data.attack_stream().state_dict())

    def add_gradients(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """Adds the gradient of the three terms."""
        shards = self.trained_weights.shards
        harmful = self.step.next_harmful_batch()
        loss_layers = layer_cross_entropy(self.model, harmful)
        self.backward_of(-share * torch.log(1 + loss_layers), harmful)

        adverse = _Side(self.step, harmful)
        if self._benign_data is None:
            benign = _Side(self.step, batch)
            # The gradient of the refusals' loss is that of the benign side here: one pass less.
            shards.add_to_gradients(benign.gradients, share * self.alpha)
            loss_safe = benign.loss
        else:
            loss_safe = differentiable_loss(self.model, batch)
            self.backward_of(share * self.alpha * loss_safe, batch)
            stream = self._benign_data.attack_stream()
            benign = _Side(self.step, move_batch(next(stream.endless()), shards.device))

        cosine = torch.zeros((), device=shards.device)
        # A cosine with a zero vector has no derivative to follow.
        if adverse.norm > 0 and benign.norm > 0:
            cosine = _dot(adverse.unit, benign.unit)
            for one, other in ((adverse, benign), (benign, adverse)):
                # d cos / d g_one, times its norm.
                pairs = zip(other.unit, one.unit, strict=True)
                shift = [self.epsilon * (b - cosine * a) for b, a in pairs]
                change = one.change_along(shift)
                shards.add_to_gradients(change, share * self.beta / (self.epsilon * one.norm))
        return {
            "loss_safe": loss_safe.detach(),
            "loss_harmful": adverse.loss,
            "loss_harmful_layers": loss_layers.detach(),
            "gradient_cosine": cosine,
        }


class _Side:
    """The gradient of the cross-entropy on a batch, and its change where the weights are shifted."""

    def __init__(self, step: Step, batch: Batch) -> None:
        self._step = step
        self._batch = batch
        self._loss: Callable[[], Tensor] = partial(differentiable_loss, step.model, batch)
        self._dropout = RandomState.capture(step.trained_weights.shards.device)
        self.gradients, self.loss = step.gradients_of(self._loss, batch)
        self.norm = float(step.trained_weights.shards.norm(self.gradients))

    @property
    def unit(self) -> Sequence[Tensor]:
        return [gradient / self.norm for gradient in self.gradients]

    def change_along(self, vector: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradient at theta + vector, minus that at theta; dropout falls the same way."""
        with kept_random_state(self._dropout.device), self._step.trained_weights.shifted(vector):
            self._dropout.restore()
            there, _ = self._step.gradients_of(self._loss, self._batch)
        return [after - before for after, before in zip(there, self.gradients, strict=True)]


def layer_cross_entropy(model: "PreTrainedModel", batch: Batch) -> Tensor:
    """Mean over the layers, embeddings included, of the cross-entropy read off each of them.

    In nats per answer token.
    """
    output = outputs_of(model, batch)
    labels = batch["labels"]
    # The last hidden state of transformers has gone through the norm: it is what logits are of.
    last = answer_cross_entropy(output.logits, labels)
    others = layer_losses(model, output.hidden_states[:-1], labels)
    return torch.stack([last, *others]).mean()


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()

"""What a defender lowers: losses on a batch, at its own weights and at attacked ones."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from patcher_pl.data.mixing import Mixture
from patcher_pl.data.stream import BatchStream
from patcher_pl.defenses.step import Step
from patcher_pl.errors import ConfigError
from patcher_pl.losses import causal_lm_loss
from patcher_pl.losses.retained import mean_where, outputs_of
from patcher_pl.models.lora import without_adapters
from patcher_pl.types import IGNORE_INDEX, Batch, move_batch
from patcher_pl.validation import require


@dataclass(frozen=True, kw_only=True)
class OuterLoss(ABC):
    """L_out: what the attacked model is trained for. A subclass says it for one batch.

    Args:
        data: Conversations that it is taken on, in batches as large as the defender's; None takes
            the defender's own batch.
    """

    data: Mixture | None = None
    supports_packing: ClassVar[bool] = False
    """Whether packed batches (see `Batch`) mean the same to it as padded ones."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the mean over the answer tokens of a batch; its gradient is taken once."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns `loss`, weighted so that the mean over processes that share a batch is right."""
        return shared_out(partial(self.loss, model), batch)


@dataclass(frozen=True, kw_only=True)
class AnswerCrossEntropy(OuterLoss):
    """Mean cross-entropy of the answers (nats per token): on safe answers, the L_safe of the paper."""

    supports_packing = True

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return causal_lm_loss(model, batch)


@dataclass(frozen=True, kw_only=True)
class NegativeEntropy(OuterLoss):
    """Minus the mean entropy with which answer tokens are predicted (nats per token).

    On harmful answers (`data`), an attacked model that knows nothing about them.

    References:
        TAR's tamper-resistance loss: Tamirisa et al., 2024, https://arxiv.org/abs/2408.00761.
    """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = outputs_of(model, batch, hidden_states=False).logits
        return negative_entropy(logits, batch["labels"])


@dataclass(frozen=True, kw_only=True)
class FixedToken(OuterLoss):
    """Mean cross-entropy of one token in the place of every answer token (nats per token).

    On general conversations (`data`), an attacked model that says the same whatever it is asked. With an
    attacker of one plain gradient step before every defender step it is CTRAP's loss,
    L_safe(theta) + lam L_c(theta - a grad L_harm(theta)), up to a factor: alpha = lam / (1 + lam). Second
    derivatives of the step are left out by `FirstOrder`, and taken by `Unrolled` or `Adjoint`.

    Args:
        data: The conversations; the paper takes benign ones.
        token_id: The token's number in the vocabulary (>= 0).

    Raises:
        ValueError: If `token_id` is negative.

    References:
        Yi et al., 2025, https://arxiv.org/abs/2505.16559: the collapse loss, with a = 0.1.
    """

    token_id: int

    def __post_init__(self) -> None:
        require(self, self.token_id >= 0, "token_id", ">= 0")

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        vocabulary = without_adapters(model).config.get_text_config().vocab_size
        if self.token_id >= vocabulary:
            raise ConfigError(
                f"FixedToken.token_id must be below {vocabulary}, the size of the vocabulary, got "
                f"{self.token_id}."
            )
        labels = batch["labels"]
        fixed = labels.masked_fill(labels != IGNORE_INDEX, self.token_id)
        return causal_lm_loss(model, {**batch, "labels": fixed})


def negative_entropy(
    logits: Float[Tensor, "batch time vocab"], labels: Int[Tensor, "batch time"]
) -> Float[Tensor, ""]:
    """Minus the mean entropy with which answer tokens are predicted, in nats per token."""
    predictions = logits[:, :-1]
    if predictions.dtype in (torch.float16, torch.bfloat16):
        # x log x of half precision loses the small probabilities that make up the entropy.
        predictions = predictions.float()
    log_likelihoods = predictions.log_softmax(-1)
    entropies = -(log_likelihoods.exp() * log_likelihoods).sum(-1)
    return -mean_where(labels[:, 1:] != IGNORE_INDEX, entropies)


def shared_out(loss: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    """A mean over a batch, times what this process's part of the batch weighs."""
    if "loss_weight" not in batch:
        return loss(batch)
    # Losses of this codebase weigh by themselves where they find the weight: it would count twice.
    own: Batch = {key: value for key, value in batch.items() if key != "loss_weight"}  # type: ignore[assignment]
    return loss(own) * batch["loss_weight"]


@dataclass(frozen=True)
class Term:
    """One summand of a defender's loss, on one batch: `weight` times `loss(model)`.

    Args:
        name: Under which the loss is logged.
        weight: Of the loss in the sum.
        loss: One forward pass over `batch`.
        batch: Whose tokens are counted.
    """

    name: str
    weight: float
    loss: Callable[[nn.Module], Tensor]
    batch: Batch


def add_gradients_here(step: Step, terms: Sequence[Term], share: float) -> dict[str, Tensor]:
    """Adds the gradients of terms where the weights are now, one after the other.

    Args:
        step: Whose `.grad`s and cost they are added to.
        terms: What is summed.
        share: Of this batch in the step.

    Returns:
        Losses by the names of the terms.
    """
    found = {}
    for term in terms:
        loss = term.loss(step.model)
        step.backward(share * term.weight * loss, term.batch)
        found[term.name] = loss.detach()
    return found


class CompanionData:
    """Other conversations, of which one batch goes with each batch of the defender.

    It is the batch at the same place in a stream of its own, so that it needs no position in
    checkpoints, and does not depend on what else is drawn.

    Args:
        data: The conversations.
    """

    def __init__(self, data: Mixture) -> None:
        self._data = data
        self._stream: BatchStream | None = None

    def open(self, step: Step) -> None:
        """Draws and encodes the data.

        Raises:
            DataError: If there is none.
        """
        self._stream = step.data.with_safe(self._data).train_dataloader()

    def batch(self, step: Step) -> Batch:
        """Returns the batch that goes with the one at hand."""
        assert self._stream is not None
        # Found by place, so that an undone or resumed step gets the same one.
        self._stream.load_state_dict({"position": step.position})
        return move_batch(next(self._stream.endless()), step.device)

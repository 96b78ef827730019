"""What a defender is to keep of the model that it began as, on benign conversations."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from patcher_pl.data.mixing import Mixture
from patcher_pl.losses.retained import (
    answer_log_likelihoods,
    mean_divergence,
    mean_state_distance,
    outputs_of,
    predicts_answers,
)
from patcher_pl.types import Batch


@dataclass(frozen=True, kw_only=True)
class Retention(ABC):
    """A distance D to the base model, in the defender's loss.

        weight D(theta) + attacked_weight D(theta + v)

    D is a mean over the answer tokens of a batch of benign conversations. Data of their own, since
    refusals, which D_safe holds too, are where the defender must leave the base model. Gradients go
    through the defender's pass alone.

    Args:
        data: Benign conversations; their answers are what is looked at. Batches are as large as the
            defender's.
        weight: Weight of the distance at theta (>= 0).
        attacked_weight: Weight of the distance after the attack (>= 0); in force once there is one.

    Raises:
        ValueError: If a weight is below 0, or both are 0.
    """

    data: Mixture
    weight: float = 1.0
    attacked_weight: float = 0.0

    def __post_init__(self) -> None:
        for field in ("weight", "attacked_weight"):
            if not getattr(self, field) >= 0:
                raise ValueError(
                    f"{type(self).__name__}.{field} must be >= 0, got {getattr(self, field)}. "
                    "Use 0 to do without."
                )
        if self.weight == self.attacked_weight == 0:
            raise ValueError(
                f"{type(self).__name__}.weight or attacked_weight must be > 0, got 0 for both. "
                "Set `Patcher.retain: null` to do without."
            )

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> Sequence[Tensor]:
        """What is compared, from one forward pass of either model."""

    @abstractmethod
    def distance(self, ours: Sequence[Tensor], kept: Sequence[Tensor], batch: Batch) -> Tensor:
        """Returns the mean distance over answer tokens.

        Args:
            ours: `outputs` of the model in training.
            kept: `outputs` of the base model.
            batch: What both have seen.
        """


@dataclass(frozen=True, kw_only=True)
class KLToBase(Retention):
    """KL(p_base || p_theta) of the next token, in nats per answer token.

    Keeps log-likelihoods of the whole vocabulary for every answer token of a batch, twice.

    References:
        The retention by divergence of unlearning methods: Maini et al., 2024,
        https://arxiv.org/abs/2401.06121, section 4.
    """

    def outputs(self, model: nn.Module, batch: Batch) -> Sequence[Tensor]:
        logits = outputs_of(model, batch, hidden_states=False).logits
        return [answer_log_likelihoods(logits, batch["labels"])]

    def distance(self, ours: Sequence[Tensor], kept: Sequence[Tensor], batch: Batch) -> Tensor:
        return mean_divergence(kept[0], ours[0])


@dataclass(frozen=True, kw_only=True)
class RepresentationDistance(Retention):
    """||h - h_base||_2 of hidden states where answer tokens are predicted, mean over all layers.

    Keeps the hidden states of all layers (embeddings included), twice. TAR takes every token, here
    those that predict an answer.

    References:
        TAR: Tamirisa et al., 2024, https://arxiv.org/abs/2408.00761, its retain loss.
    """

    def outputs(self, model: nn.Module, batch: Batch) -> Sequence[Tensor]:
        return outputs_of(model, batch).hidden_states

    def distance(self, ours: Sequence[Tensor], kept: Sequence[Tensor], batch: Batch) -> Tensor:
        return mean_state_distance(ours, kept, predicts_answers(batch["labels"]))

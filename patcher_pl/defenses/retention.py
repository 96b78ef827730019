"""What a defender is to keep of the model that it began as, on benign conversations."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patcher_pl.data.mixing import Mixture
from patcher_pl.defenses.base_model import BaseModel
from patcher_pl.defenses.outer_loss import CompanionData, Term, shared_out
from patcher_pl.defenses.step import Step
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


class Retained:
    """The terms of a retention in a defender's loss, batch by batch.

    Args:
        retention: The distance, its weights and its data.
        base: The model that is retained.
    """

    def __init__(self, retention: Retention, base: BaseModel) -> None:
        self._retention = retention
        self._base = base
        self._data = CompanionData(retention.data)

    def open(self, step: Step) -> None:
        """Draws and encodes the data, and moves the base model beside the model.

        Raises:
            DataError: If there is none.
        """
        self._base.place()
        self._data.open(step)

    def terms(self, step: Step, *, is_attacked: bool) -> tuple[list[Term], list[Term]]:
        """Returns what is retained at theta, and what after the attack, for the batch at hand.

        The base model is asked here, once for both, and before any weights are shifted.
        """
        own, there = self._retention.weight, self._retention.attacked_weight
        weights = {"retain_distance": own, "retain_distance_attacked": there * is_attacked}
        if not any(weights.values()):
            return [], []
        batch = self._data.batch(step)
        with self._base.in_place() as base, torch.no_grad():
            # The base model's pass has no graph: it is a constant of the distance.
            kept = self._retention.outputs(base, batch)

        def distance(model: nn.Module) -> Tensor:
            ours = self._retention.outputs(model, batch)
            return shared_out(lambda own: self._retention.distance(ours, kept, own), batch)

        here, attacked = (
            [Term(name, weight, distance, batch)] if weight else []
            for name, weight in weights.items()
        )
        return here, attacked

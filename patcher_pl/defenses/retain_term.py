"""The retention term of a defender's loss, batch by batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patcher_pl.data.stream import BatchStream
from patcher_pl.defenses.base_model import BaseModel
from patcher_pl.defenses.retention import Retention
from patcher_pl.models import Weights
from patcher_pl.types import Batch, move_batch

if TYPE_CHECKING:
    from patcher_pl.defenses.base import Defense


@dataclass(frozen=True)
class Kept:
    """A benign batch, and what the base model makes of it."""

    batch: Batch
    outputs: Sequence[Tensor]


class RetainTerm:
    """Draws benign batches and adds the gradients of their distances to the base model.

    The batch that goes with a batch of the defender is the one at the same place in its own stream,
    so that it needs no position of its own in checkpoints.

    Args:
        defense: In training; its weights are now those of the base model.
        weights: Owner of all its weights.
        retention: The distance, its weights and its data.
    """

    def __init__(self, defense: "Defense", weights: Weights, retention: Retention) -> None:
        self._defense = defense
        self._retention = retention
        has_adapters = defense.language_model.lora is not None
        self._base = BaseModel(defense.model, weights, has_adapters=has_adapters)
        self._stream: BatchStream | None = None

    def open(self) -> None:
        """Draws and encodes the data, and moves the base model beside the model.

        Raises:
            DataError: If there is none.
        """
        self._base.place()
        data = self._defense.trainer.datamodule.with_safe(self._retention.data)  # type: ignore[attr-defined]
        self._stream = data.train_dataloader()

    def next(self, is_attacked: bool) -> Kept | None:
        """Takes the benign batch that goes with the defender's newest one to the base model.

        Args:
            is_attacked: Whether the step has an attack vector.

        Returns:
            None where the step has no distance with a weight.
        """
        weights = self._retention
        if weights.weight == 0 and not (is_attacked and weights.attacked_weight > 0):
            return None
        assert self._stream is not None
        position = self._defense.trainer.train_dataloader.position - 1  # type: ignore[union-attr]
        self._stream.load_state_dict({"position": position})
        batch = move_batch(next(self._stream.endless()), self._defense.device)
        with self._base.in_place() as base, torch.no_grad():
            return Kept(batch, self._retention.outputs(base, batch))

    def add_gradient(self, kept: Kept, share: float, field: str) -> list[Tensor]:
        """Adds the gradient of the distance where the weights are now.

        Args:
            kept: What `next` returned.
            share: Share of this batch, and of this vector, in the step.
            field: Which weight of the retention applies here.

        Returns:
            The distance; nothing where its weight is 0.
        """
        weight = getattr(self._retention, field)
        if weight == 0:
            return []
        ours = self._retention.outputs(self._defense.model, kept.batch)
        distance = self._retention.distance(ours, kept.outputs, kept.batch)
        if "loss_weight" in kept.batch:
            distance = distance * kept.batch["loss_weight"]
        self._defense.backward_of(share * weight * distance, kept.batch)
        return [distance.detach()]

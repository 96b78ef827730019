"""The loops that a researcher would write: padded batches, all logits, torch's defaults."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from patcher_pl.types import Batch


@dataclass
class PlainSteps:
    """Optimizer steps on one model, taken one at a time.

    Args:
        model: Causal LM in training mode.
        batches: Endless padded batches, on any device.
        lr: Step size of AdamW.
        attack_vector: Added for one of two losses in every step; None fine-tunes.
        alpha: Weight of the loss at the attacked weights.
        max_grad_norm: Global gradient norm to clip to.
    """

    model: nn.Module
    batches: Iterator[Batch]
    lr: float
    attack_vector: Sequence[Tensor] | None = None
    alpha: float = 0.5
    max_grad_norm: float = 1.0
    _optimizer: Any = field(init=False)

    def __post_init__(self) -> None:
        self._parameters = list(self.model.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=self.lr)
        self._device = self._parameters[0].device

    def step(self) -> float:
        """Takes one; returns the loss at the weights before it."""
        taken: Any = next(self.batches)
        batch: Any = {key: tensor.to(self._device) for key, tensor in taken.items()}
        weight = 1.0
        if self.attack_vector is not None:
            weight = 1 - self.alpha
            self._shift(1)
            (self.alpha * self.model(**batch).loss).backward()
            self._shift(-1)
        loss = self.model(**batch).loss
        (weight * loss).backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def _shift(self, sign: int) -> None:
        assert self.attack_vector is not None
        for parameter, change in zip(self._parameters, self.attack_vector, strict=True):
            parameter.add_(change, alpha=sign)

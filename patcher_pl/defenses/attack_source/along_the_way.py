"""Attacked weights all along an attack, each used while the attack is there: TAR's gradient."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.defenses.attack_source.base import AttackSource
from patcher_pl.defenses.outer_loss import Term
from patcher_pl.defenses.step import Step
from patcher_pl.models import Weights


class AlongTheWay(AttackSource):
    """Attacks anew for every outer gradient, and takes it at many points theta_k of the way.

        sum_k exp(decay (k - (K - 1))) grad L_out(theta_k)

    The gradient at theta_k is applied to theta (first order). No vector is kept: a point is left
    behind once its gradient is taken. What is attacked is what the defense trains, since the points
    are those of its own parameters: under adapters, these alone.

    Args:
        attackers: Of which every attack takes one, by seed and step; all of the same length, K.
        gradient_every: Attack steps from one point to the next (count).
        decay: Decrease of the weights towards early steps, lambda (>= 0).
        draw: Names that the draws of attackers are made by.
    """

    def __init__(
        self,
        attackers: Sequence[FineTuningAttacker],
        *,
        gradient_every: int,
        decay: float,
        draw: Sequence[str],
    ) -> None:
        super().__init__(attackers[0], refresh_every=1, num_sft_steps=0)
        self._attackers = list(attackers)
        self._gradient_every = gradient_every
        self._decay = decay
        self._draw = tuple(draw)

    def prepare(self, step: Step) -> None:
        """Has nothing to do: the attack is part of the outer gradient."""

    def has_attacked(self, step: Step) -> bool:
        return True

    def add_gradients(self, step: Step, terms: Sequence[Term], share: float) -> dict[str, Tensor]:
        weights = step.trained_weights
        attacker = self._attackers[step.seed_of(*self._draw, step.number) % len(self._attackers)]
        # The adversary walks on the live weights, which are the defender's; whatever happens they
        # go back.
        saved = weights.snapshot()
        total = [torch.zeros_like(tensor) for tensor in weights.shards.tensors]
        found: dict[str, list[Tensor]] = {term.name: [] for term in terms}
        attack_losses: list[float] = []
        batches = step.attack_stream.endless()
        try:
            with weights.trainable() as parameters:
                for taken in attacker.steps(step.model, parameters, batches, step.check_for_stop):
                    step.cost.add(num_tokens=taken.num_tokens)
                    attack_losses.append(taken.loss)
                    if taken.index % self._gradient_every:
                        continue
                    # k counts from 0 and taken.index from 1: k - (K - 1) = index - K.
                    weight = math.exp(self._decay * (taken.index - attacker.num_steps))
                    for term in terms:
                        gradients, loss = step.gradients_of(
                            lambda term=term: term.loss(step.model), term.batch
                        )
                        for sum_, gradient in zip(total, gradients, strict=True):
                            sum_.add_(gradient, alpha=weight * term.weight)
                        found[term.name].append(loss)
        finally:
            weights.restore(saved)
        # Only now, at theta again: within the attack every `.grad` belongs to the adversary.
        weights.shards.add_to_gradients(total, share)
        ends = {"loss_attack_first": attack_losses[0], "loss_attack_last": attack_losses[-1]}
        return {
            **{name: torch.stack(losses).mean() for name, losses in found.items()},
            **{name: torch.tensor(loss, device=step.device) for name, loss in ends.items()},
        }

    def save(self, checkpoint: dict[str, Any], weights: Weights) -> None:
        """Keeps nothing: the next step attacks anew."""

    def load(self, checkpoint: dict[str, Any], weights: Weights, path: Any) -> None:
        """Needs nothing."""

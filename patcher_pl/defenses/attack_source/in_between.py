"""Attacks in between defender steps, each used for many of them: Patcher's stale gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patcher_pl.attackers import Attacker, Carried, Combine, combined
from patcher_pl.defenses.attack_source.base import (
    AttackSource,
    Vector,
    account_for_attack,
    add_gradients_at,
    checked_norm,
)
from patcher_pl.defenses.attack_source.refresh import AdaptiveRefresh
from patcher_pl.defenses.outer_loss import Term
from patcher_pl.defenses.step import Step
from patcher_pl.models import Weights
from patcher_pl.types import count_tokens


class InBetween(AttackSource):
    """Attacks in the defender's process, then holds the vectors for `refresh_every` steps.

    Args:
        attacker: The simulated attack; gives a vector at every point it was asked for.
        refresh_every: As for every source.
        num_sft_steps: As for every source.
        combine: Which of the vectors a defender step is taken against.
        adaptive: Changes k2 after every attack, beginning with `refresh_every`; None keeps it.
    """

    def __init__(
        self,
        attacker: Attacker,
        *,
        refresh_every: int,
        num_sft_steps: int,
        combine: Combine = "average",
        adaptive: AdaptiveRefresh | None = None,
    ) -> None:
        super().__init__(attacker, refresh_every=refresh_every, num_sft_steps=num_sft_steps)
        self._combine: Combine = combine
        self._adaptive = adaptive
        self._next_due = num_sft_steps
        self._replaced: Sequence[Vector] = []

    def prepare(self, step: Step) -> None:
        if not self.is_due(step):
            return
        number = self.num_attacks
        drawn = self.attacker.draw(step.seed, number)
        start = None if drawn.begins_anew else self.carried.get(drawn.kind)
        outcome = drawn.attacker.attack(
            step.model,
            step.all_weights,
            step.attack_batches(drawn),
            before_step=step.check_for_stop,
            **({} if start is None else {"start": start}),
        )
        if self._adaptive is not None:
            self._replaced, self._next_due = self.vectors, step.number + self.refresh_every
        self.vectors = outcome.vectors
        self.num_attacks += 1
        num_steps = outcome.num_steps_from(start)
        if drawn.is_carried:
            self.carried[drawn.kind] = Carried(outcome.vector, num_steps, outcome.moments)
        account_for_attack(
            step,
            drawn,
            # Refused here rather than in the step: a diverged vector would be blamed on the
            # defender's rate.
            norm=checked_norm(step, outcome.vector),
            losses=[taken.loss for taken in outcome.steps],
            num_tokens=[taken.num_tokens for taken in outcome.steps],
            steps_before=self.attacker.steps_before(step.seed, number),
            num_steps_from_theta=num_steps,
        )

    def has_attacked(self, step: Step) -> bool:
        return bool(self.vectors)

    def add_gradients(self, step: Step, terms: Sequence[Term], share: float) -> dict[str, Tensor]:
        vectors = combined(self.vectors, self._combine, step=step.number, seed=step.seed)
        if self._adaptive is not None and self._replaced:
            self._adapt(step, terms[0], self._adaptive)
        return add_gradients_at(step, vectors, terms, share)

    def is_due(self, step: Step) -> bool:
        return super().is_due(step) if self._adaptive is None else step.number >= self._next_due

    def release(self) -> None:
        super().release()
        self._replaced = []

    def save(self, checkpoint: dict[str, Any], weights: Weights) -> None:
        super().save(checkpoint, weights)
        if self._adaptive is not None:
            rounds = {"refresh_every": self.refresh_every, "next_due": self._next_due}
            checkpoint["defense"]["rounds"] = rounds

    def load(self, checkpoint: dict[str, Any], weights: Weights, path: Any) -> None:
        super().load(checkpoint, weights, path)
        if self._adaptive is not None and (rounds := checkpoint["defense"].get("rounds")):
            self.refresh_every, self._next_due = rounds["refresh_every"], rounds["next_due"]

    def _adapt(self, step: Step, outer: Term, adaptive: AdaptiveRefresh) -> None:
        """Measures how stale the vectors before these had become, and chooses k2 by that."""
        losses = []
        for vector in (self._replaced[-1], self.vectors[-1]):
            with step.all_weights.shifted(vector), torch.no_grad():
                losses.append(step.all_weights.shards.mean(outer.loss(step.model)))
        self._replaced = []
        step.cost.add(num_tokens=count_tokens(outer.batch))
        gap = losses[1] - losses[0]
        self.refresh_every = adaptive.adapted(self.refresh_every, gap)
        self._next_due = step.number + self.refresh_every
        step.log({"attack/staleness_gap": gap, "attack/refresh_every": self.refresh_every})

"""Attacks in between defender steps, each used for many of them: Patcher's stale gradient."""

from collections.abc import Sequence

from torch import Tensor

from patcher_pl.attackers import Attacker, Carried, Combine, combined
from patcher_pl.defenses.attack_source.base import (
    AttackSource,
    account_for_attack,
    add_gradients_at,
    checked_norm,
)
from patcher_pl.defenses.outer_loss import Term
from patcher_pl.defenses.step import Step


class InBetween(AttackSource):
    """Attacks in the defender's process, then holds the vectors for `refresh_every` steps.

    Args:
        attacker: The simulated attack; gives a vector at every point it was asked for.
        refresh_every: As for every source.
        num_sft_steps: As for every source.
        combine: Which of the vectors a defender step is taken against.
    """

    def __init__(
        self,
        attacker: Attacker,
        *,
        refresh_every: int,
        num_sft_steps: int,
        combine: Combine = "average",
    ) -> None:
        super().__init__(attacker, refresh_every=refresh_every, num_sft_steps=num_sft_steps)
        self._combine: Combine = combine

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
            start=start,
        )
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
        return add_gradients_at(step, vectors, terms, share)

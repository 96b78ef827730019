"""Fresh hypergradients: the attack is differentiated in the step that uses it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from patcher_pl.attackers import Attacker, InnerProblem
from patcher_pl.defenses.attack_source.base import (
    AttackSource,
    add_gradients_at,
    checked_norm,
)
from patcher_pl.defenses.outer_loss import Term
from patcher_pl.defenses.step import Step
from patcher_pl.errors import ConfigError
from patcher_pl.hypergradients import (
    Hypergradient,
    HypergradientEstimate,
    measure_trust,
)
from patcher_pl.hypergradients.base import SHARDED_REMEDY
from patcher_pl.models import Lora, Sharding
from patcher_pl.types import count_tokens
from patcher_pl.validation import require


class Fresh(AttackSource):
    """Estimates d L_out(theta_att) / d theta where an attack is due, once per batch of the step.

    All estimates of a step are of the same attack. The steps in between go on with the attack vector
    of the last one, by the stale first-order gradient.

    Args:
        owner: Class of the defense, for messages.
        attacker: The simulated attack.
        hypergradient: The estimator; any but `FirstOrder`.
        refresh_every: Steps from one estimate to the next (count).
        num_sft_steps: As for every source.
        trust_every: Attack once more after every so many such steps, to log the change of the outer
            loss beside the predicted one (count, >= 1); None never does.
        lora: Adapters that the defense trains in place of every weight.

    Raises:
        ValueError: If these attacks, or adapters, cannot be differentiated.
    """

    def __init__(
        self,
        owner: str,
        attacker: Attacker,
        hypergradient: Hypergradient,
        *,
        refresh_every: int,
        num_sft_steps: int,
        trust_every: int | None,
        lora: Lora | None,
    ) -> None:
        super().__init__(attacker, refresh_every=refresh_every, num_sft_steps=num_sft_steps)
        state_dtype = getattr(getattr(attacker, "optimizer", None), "state_dtype", None)
        for field, value, holds, rule, remedy in (
            (
                "attacker.optimizer.state_dtype",
                state_dtype,
                state_dtype is None,
                "null for this `hypergradient`, which differentiates the attack",
                "Leave it away, or use FirstOrder.",
            ),
            (
                "attacker",
                attacker,
                attacker.is_differentiable,
                "a FineTuningAttacker of all weights by AdamW or SGD, without lora, carry, restarts "
                "and state_dtype, for this `hypergradient`",
                "Change these settings, or use FirstOrder.",
            ),
            (
                "attacker.vector_steps",
                getattr(attacker, "vector_steps", None),
                attacker.num_vectors == 1,
                "null for this `hypergradient`, which differentiates the end of an attack",
                "Use FirstOrder for several points.",
            ),
            (
                "language_model.lora",
                lora,
                lora is None,
                "null for this `hypergradient`",
                "Train every weight or use FirstOrder.",
            ),
        ):
            require(owner, holds, field, rule, remedy, value=value)
        self.hypergradient = hypergradient
        self.trust_every = trust_every
        self._inner: InnerProblem | None = None
        self._last: tuple[HypergradientEstimate, Callable[[nn.Module], Tensor]] | None = None

    def prepare(self, step: Step) -> None:
        if self.is_due(step):
            drawn = self.attacker.draw(step.seed, self.num_attacks)
            self._inner = drawn.attacker.inner_problem(step.attack_batches(drawn))
            self.num_attacks += 1
            # An attack that is called off is made again by the run that goes on, and counts once.
            step.on_undo(self._forget)

    def has_attacked(self, step: Step) -> bool:
        return self._inner is not None or bool(self.vectors)

    def add_gradients(self, step: Step, terms: Sequence[Term], share: float) -> dict[str, Tensor]:
        if self._inner is None:
            return add_gradients_at(step, self.vectors, terms, share)
        inner, losses = self._inner, {}
        # A single term is weighed afterwards, so that diagnostics are in its own unit.
        scale, weights = 1.0, [term.weight for term in terms]
        if len(terms) == 1:
            scale, weights = weights[0], [1.0]

        def outer_loss(model: nn.Module) -> Tensor:
            # Summed before differentiating: one walk back through the attack serves all terms.
            found = [term.loss(model) for term in terms]
            pairs = zip(terms, found, strict=True)
            losses.update({term.name: loss.detach() for term, loss in pairs})
            return torch.stack([w * loss for w, loss in zip(weights, found, strict=True)]).sum()

        estimate = self.hypergradient.estimate(
            step.model, step.all_weights, inner, outer_loss, step.check_for_stop
        )
        norm = checked_norm(step, estimate.attack_vector)
        step.all_weights.shards.add_to_gradients(estimate.gradients, share * scale)
        self.vectors = [estimate.attack_vector]
        self._last = estimate, outer_loss
        # Everything but the outer gradient runs over attack batches.
        evaluations = estimate.gradient_evaluations - 1
        num_tokens = round(evaluations * inner.num_tokens / inner.num_steps)
        step.cost.add(num_tokens=num_tokens, gradient_evaluations=math.ceil(evaluations))
        for term in terms:
            step.cost.add(num_tokens=count_tokens(term.batch))
        step.log({f"hypergradient/{k}": v for k, v in estimate.diagnostics.items()})
        step.log({"attack/vector_norm": norm})
        return dict(losses)

    def finish(self, step: Step, take_step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        inner, last = self._inner, self._last
        self._inner = self._last = None
        if inner is None or last is None:
            return take_step()
        if self.trust_every is None or self.num_attacks % self.trust_every:
            return take_step()
        estimate, outer_loss = last
        # One more copy of the weights, in these steps only.
        before = step.all_weights.snapshot()
        metrics = take_step()
        trust = measure_trust(
            *(step.model, step.all_weights, inner, outer_loss, estimate),
            step.all_weights.difference(before),
        )
        step.cost.add(num_tokens=inner.num_tokens, gradient_evaluations=inner.num_steps)
        changes = {"predicted_change": trust.predicted, "actual_change": trust.actual}
        step.log({f"hypergradient/{key}": value for key, value in changes.items()})
        return metrics

    def release(self) -> None:
        super().release()
        self._inner = self._last = None

    def require_shardable(self, owner: str, sharding: Sharding) -> None:
        super().require_shardable(owner, sharding)
        name = type(self.hypergradient).__name__
        if not self.hypergradient.works_sharded:
            raise ConfigError(
                f"{owner}.hypergradient: {name} as configured differentiates a gradient, which FSDP2 "
                f"cannot. {SHARDED_REMEDY}"
            )
        if sharding.param_dtype == "bfloat16":
            raise ConfigError(
                "LanguageModel.sharding.param_dtype: differences of gradients in bfloat16 are mostly "
                f"noise, so {name} cannot use them. Use `param_dtype: null`, or FirstOrder."
            )

    def _forget(self) -> None:
        self.num_attacks -= 1
        self._inner = self._last = None

"""Fresh hypergradients within a defender step, and how far they can be trusted."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patcher_pl.attackers import Attacker, InnerProblem
from patcher_pl.defenses.attack_report import checked_norm, log_now
from patcher_pl.defenses.retention import Retention
from patcher_pl.hypergradients import HypergradientEstimate, OuterLoss, measure_trust
from patcher_pl.losses import causal_lm_loss
from patcher_pl.models import LanguageModel
from patcher_pl.types import Batch, count_tokens

if TYPE_CHECKING:
    from patcher_pl.defenses.patcher import Patcher


Rule = tuple[bool, str, str, object, str]


def rules_for_estimates(
    attacker: Attacker, language_model: LanguageModel, retain: Retention | None
) -> list[Rule]:
    """What must hold for any estimator but `FirstOrder`: condition, field, rule, value and remedy."""
    return [
        (
            attacker.is_differentiable,
            "attacker",
            "a FineTuningAttacker without lora, by AdamW or SGD, for this `hypergradient`",
            attacker,
            "Set `attacker.lora: null` and such an optimizer, or use FirstOrder.",
        ),
        (
            attacker.num_vectors == 1,
            "attacker.vector_steps",
            "null for this `hypergradient`, which differentiates the end of an attack",
            getattr(attacker, "vector_steps", None),
            "Use FirstOrder for several points.",
        ),
        (
            language_model.lora is None,
            "language_model.lora",
            "null for this `hypergradient`",
            language_model.lora,
            "Train every weight or use FirstOrder.",
        ),
        (
            retain is None or retain.attacked_weight == 0,
            "retain.attacked_weight",
            "0 for this `hypergradient`, whose outer loss is L_safe alone",
            None if retain is None else retain.attacked_weight,
            "Retain at theta, by `weight`, or use FirstOrder.",
        ),
    ]


class FreshEstimate:
    """The estimates of one defender step, one per batch, all of the same attack.

    Args:
        defense: Whose step it is.
    """

    def __init__(self, defense: "Patcher") -> None:
        stream = defense.trainer.datamodule.attack_stream()  # type: ignore[attr-defined]
        self._defense = defense
        self.inner: InnerProblem = defense.attacker.inner_problem(stream.endless())
        self._last: tuple[HypergradientEstimate, OuterLoss] | None = None

    def add_gradient(
        self, batch: Batch, weight: float, before_step: Callable[[], None]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Adds `weight` times the estimate for a batch.

        Args:
            batch: Of safe conversations.
            weight: Weight of the loss after the attack.
            before_step: Called before every step of the attack and of the way back; may raise.

        Returns:
            The loss after the attack, and the attack vector.
        """
        defense, inner = self._defense, self.inner

        def outer_loss(model: torch.nn.Module) -> Tensor:
            return causal_lm_loss(model, batch)

        estimate = defense.hypergradient.estimate(
            defense.model, defense.weights, inner, outer_loss, before_step
        )
        norm = checked_norm(defense.weights, estimate.attack_vector, defense.global_step)
        defense.weights.shards.add_to_gradients(estimate.gradients, weight)
        self._last = estimate, outer_loss
        # Everything but the outer gradient runs over attack batches.
        evaluations = estimate.gradient_evaluations - 1
        num_tokens = round(evaluations * inner.num_tokens / inner.num_steps)
        defense.cost.add(num_tokens=num_tokens, gradient_evaluations=math.ceil(evaluations))
        defense.cost.add(num_tokens=count_tokens(batch))
        log_now(defense, {f"hypergradient/{k}": v for k, v in estimate.diagnostics.items()})
        log_now(defense, {"attack/vector_norm": norm})
        loss = torch.tensor(estimate.outer_loss, device=defense.device)
        return loss, estimate.attack_vector

    def measured(self, take_step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Takes the step, attacks once more and logs what was predicted of it and what it did."""
        defense, inner = self._defense, self.inner
        assert self._last is not None
        estimate, outer_loss = self._last
        before = defense.weights.snapshot()
        metrics = take_step()
        trust = measure_trust(
            *(defense.model, defense.weights, inner, outer_loss, estimate),
            defense.weights.difference(before),
        )
        defense.cost.add(num_tokens=inner.num_tokens, gradient_evaluations=inner.num_steps)
        changes = {"predicted_change": trust.predicted, "actual_change": trust.actual}
        log_now(defense, {f"hypergradient/{key}": value for key, value in changes.items()})
        return metrics

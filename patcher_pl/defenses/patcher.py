"""Patcher: adversarial training against simulated fine-tuning attacks."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from patcher_pl.attackers import Attacker, AttackOutcome, InnerProblem
from patcher_pl.defenses.base import Defense
from patcher_pl.errors import ConfigError, RunInterrupted
from patcher_pl.hypergradients import (
    FirstOrder,
    Hypergradient,
    HypergradientEstimate,
    OuterLoss,
    measure_trust,
)
from patcher_pl.losses import causal_lm_loss
from patcher_pl.models import LanguageModel, Weights
from patcher_pl.models.weights import vector_norm
from patcher_pl.types import Batch

logger = logging.getLogger(__name__)


class Patcher(Defense):
    """Trains the attacked model to refuse, by a stale first-order hypergradient (sequential form).

    The first `num_sft_steps` defender steps minimize L_safe(theta). From then on, every
    `refresh_every` (k2) steps the attacker goes from the current theta to theta_att, and

        v = theta_att - theta                                   (attack vector, held fixed)
        theta <- step on  alpha L_safe(theta + v) + (1 - alpha) L_safe(theta)

    The gradient at theta + v is applied to theta: the Jacobian of the attack is taken to be the
    identity. With another `hypergradient`, the steps before which an attack is due (every step, if
    `refresh_every` is 1) use its estimate of d L_safe(theta_att) / d theta instead, from a fresh
    attack; the steps in between go on with v as above.

    Args:
        language_model: The model to harden.
        attacker: The simulated attack (k1 = its `num_steps`).
        optimizer: Builds the optimizer from the parameters; AdamW with lr 1e-5 unless given.
        scheduler: Builds a learning-rate schedule from the optimizer; None keeps it constant.
        hypergradient: How the loss after the attack is differentiated; None for `FirstOrder`, the
            paper's. Any other attacks once per batch of a step, in full precision.
        trust_every: Attack once more after every so many fresh estimates, to log the change of the
            outer loss beside the predicted one (count, >= 1). None never does.
        alpha: Weight of the attacked model's loss (in [0, 1]); the rest weighs the loss at theta.
        refresh_every: Defender steps for which an attack vector is used (k2, count, >= 1).
        num_sft_steps: Defender steps before the first attack (count, >= 0); None takes
            `refresh_every`, as the paper's first round does.
        restart_optimizer: Forget the optimizer's state at every new attack vector, as the authors'
            scripts do, which train each round in a new process. Off, it is carried on.
        max_grad_norm: Global gradient norm to clip to; None leaves gradients as they are.
        accumulate_grad_batches: Batches whose mean loss makes one step (count, >= 1).

    Raises:
        ValueError: If a value is out of its range.

    References:
        Patcher, https://arxiv.org/abs/2606.07970; defaults from its sequential run script.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        attacker: Attacker,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5),
        scheduler: LRSchedulerCallable | None = None,
        alpha: float = 0.5,
        refresh_every: int = 1000,
        num_sft_steps: int | None = None,
        restart_optimizer: bool = False,
        max_grad_norm: float | None = 1.0,
        accumulate_grad_batches: int = 1,
        hypergradient: Hypergradient | None = None,
        trust_every: int | None = None,
    ) -> None:
        super().__init__(
            language_model, optimizer, scheduler, max_grad_norm, accumulate_grad_batches
        )
        self._require(
            0 <= alpha <= 1, "alpha", "in [0, 1]", alpha, "Use 0.5 to weigh both losses equally."
        )
        self._require(
            refresh_every >= 1,
            "refresh_every",
            ">= 1",
            refresh_every,
            "Use 1 to attack before every step.",
        )
        self._require(
            num_sft_steps is None or num_sft_steps >= 0,
            "num_sft_steps",
            ">= 0 or null",
            num_sft_steps,
            "Use 0 to attack from the first step on.",
        )
        self.hypergradient = FirstOrder() if hypergradient is None else hypergradient
        self._require(
            trust_every is None or (trust_every >= 1 and not self.is_first_order),
            "trust_every",
            ">= 1 with a `hypergradient` other than FirstOrder, or null",
            trust_every,
            "Use null to save the attacks.",
        )
        self._require(
            self.is_first_order or attacker.is_differentiable,
            "attacker",
            "a FineTuningAttacker without lora, for this `hypergradient`",
            attacker,
            "Set `attacker.lora: null` or use FirstOrder.",
        )
        self._require(
            self.is_first_order or language_model.lora is None,
            "language_model.lora",
            "null for this `hypergradient`",
            language_model.lora,
            "Train every weight or use FirstOrder.",
        )
        self.trust_every = trust_every
        self.attacker = attacker
        self.alpha = alpha
        self.refresh_every = refresh_every
        self.num_sft_steps = refresh_every if num_sft_steps is None else num_sft_steps
        self.restart_optimizer = restart_optimizer
        self.attack_vector: Sequence[Tensor] | None = None
        self._num_attacks = 0
        self._weights: Weights | None = None
        self._inner: InnerProblem | None = None
        self._fresh: tuple[HypergradientEstimate, OuterLoss] | None = None

    @property
    def is_first_order(self) -> bool:
        """Whether the paper's own gradient is used at all steps."""
        return isinstance(self.hypergradient, FirstOrder)

    @property
    def num_attack_steps(self) -> int | None:
        """Steps of the simulated attack (k1)."""
        return self.attacker.num_steps

    @property
    def weights(self) -> Weights:
        """Owner of the model's weights."""
        if self._weights is None:
            self._weights = Weights(self.model)
        return self._weights

    def on_fit_start(self) -> None:
        """Refuses to start without data for the attacks, which may be due hours later only."""
        super().on_fit_start()
        if not getattr(self.trainer.datamodule, "has_attack", False):  # type: ignore[attr-defined]
            raise ConfigError(
                "SafetyDataModule.attack: Patcher attacks its model in training and needs harmful "
                "conversations for that, got none. Set `data.attack`, or use SFT."
            )
        if 0 <= self.trainer.max_steps <= self.num_sft_steps:
            logger.warning(
                "Patcher never attacks in this run: trainer.max_steps %d, num_sft_steps %d.",
                *(self.trainer.max_steps, self.num_sft_steps),
            )

    def on_train_start(self) -> None:
        """Moves a restored attack vector to where the weights are."""
        super().on_train_start()
        if self.attack_vector is not None:
            device = self.weights.parameters[0].device
            self.attack_vector = [tensor.to(device) for tensor in self.attack_vector]

    def before_step(self) -> None:
        """Attacks where a new attack vector is due."""
        steps_since_sft = self.global_step - self.num_sft_steps
        if steps_since_sft >= 0 and steps_since_sft // self.refresh_every >= self._num_attacks:
            if self.is_first_order:
                self._refresh_attack_vector()
            else:
                stream = self.trainer.datamodule.attack_stream()  # type: ignore[attr-defined]
                self._inner = self.attacker.inner_problem(stream.endless())
                self._count_attack()

    def add_gradients(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """Adds the gradient of the two-term loss, or of L_safe while there is no attack yet."""
        if self._inner is None and self.attack_vector is None:
            loss_safe = causal_lm_loss(self.model, batch)
            self.backward_of(share * loss_safe, batch)
            return {"loss_safe": loss_safe.detach()}
        if self._inner is not None:
            loss_attacked = self._add_hypergradient(self._inner, batch, share * self.alpha)
        else:
            assert self.attack_vector is not None
            with self.weights.shifted(self.attack_vector):
                loss_attacked = causal_lm_loss(self.model, batch)
                self.backward_of(share * self.alpha * loss_attacked, batch)
        loss_safe = causal_lm_loss(self.model, batch)
        self.backward_of(share * (1 - self.alpha) * loss_safe, batch)
        gap = (loss_attacked - loss_safe).detach()
        return {
            "loss_safe": loss_safe.detach(),
            "loss_attacked": loss_attacked.detach(),
            "attack_gap": gap,
        }

    def _add_hypergradient(self, inner: InnerProblem, batch: Batch, weight: float) -> Tensor:
        """Adds `weight` times the estimate for a batch; returns the loss after the attack."""

        def outer_loss(model: torch.nn.Module) -> Tensor:
            return causal_lm_loss(model, batch)

        try:
            estimate = self.hypergradient.estimate(
                self.model, self.weights, inner, outer_loss, self._check_for_stop
            )
        except RunInterrupted:
            self._forget_step(inner)
            raise
        self._check_norm(norm := float(vector_norm(estimate.attack_vector)))
        for parameter, gradient in zip(self.weights.parameters, estimate.gradients, strict=True):
            if parameter.requires_grad:
                scaled = gradient * weight
                parameter.grad = scaled if parameter.grad is None else parameter.grad + scaled
        self.attack_vector = estimate.attack_vector
        self._fresh = estimate, outer_loss
        # Everything but the outer gradient runs over attack batches.
        evaluations = estimate.gradient_evaluations - 1
        num_tokens = round(evaluations * inner.num_tokens / inner.num_steps)
        self.cost.add(num_tokens=num_tokens, gradient_evaluations=math.ceil(evaluations))
        self.cost.add(num_tokens=int(batch["attention_mask"].sum()))
        self._log_now({f"hypergradient/{k}": v for k, v in estimate.diagnostics.items()})
        self._log_now({"attack/vector_norm": norm})
        return torch.tensor(estimate.outer_loss, device=self.device)

    def _forget_step(self, inner: InnerProblem) -> None:
        """Goes back to where this step had not begun: the same batches will be handed out again."""
        self.trainer.datamodule.attack_stream().rewind(inner.num_steps)  # type: ignore[attr-defined]
        loader = self.trainer.train_dataloader
        loader.rewind(self._num_accumulated + 1)  # type: ignore[union-attr]
        self.model.zero_grad(set_to_none=True)
        self._num_accumulated, self._losses = 0, {}
        self._num_attacks -= 1
        self._inner = None

    def _take_step(self) -> dict[str, Any]:
        inner, fresh = self._inner, self._fresh
        self._inner = self._fresh = None
        due = self.trust_every is not None and self._num_attacks % self.trust_every == 0
        if inner is None or fresh is None or not due:
            return super()._take_step()
        before = self.weights.snapshot()
        metrics = super()._take_step()
        estimate, outer_loss = fresh
        trust = measure_trust(
            *(self.model, self.weights, inner, outer_loss, estimate),
            self.weights.difference(before),
        )
        self.cost.add(num_tokens=inner.num_tokens, gradient_evaluations=inner.num_steps)
        changes = {"predicted_change": trust.predicted, "actual_change": trust.actual}
        self._log_now({f"hypergradient/{key}": value for key, value in changes.items()})
        return metrics

    def _refresh_attack_vector(self) -> None:
        stream = self.trainer.datamodule.attack_stream()  # type: ignore[attr-defined]
        start = stream.position
        try:
            outcome = self.attacker.attack(
                self.model, self.weights, stream.endless(), before_step=self._check_for_stop
            )
        except RunInterrupted:
            # As if this step had never begun: both streams will hand out the same batches again.
            stream.rewind(stream.position - start)
            self.trainer.train_dataloader.rewind()  # type: ignore[union-attr]
            raise
        self._check_norm(norm := float(vector_norm(outcome.vector)))
        self.attack_vector = outcome.vector
        for step in outcome.steps:
            self.cost.add(num_tokens=step.num_tokens)
        self._count_attack()
        self._log_attack(outcome, norm)

    def _count_attack(self) -> None:
        self._num_attacks += 1
        if self.restart_optimizer:
            self.optimizers().optimizer.state.clear()  # type: ignore[union-attr]

    def _check_norm(self, norm: float) -> None:
        if not math.isfinite(norm):
            raise ConfigError(
                f"Patcher.attacker: the simulated attack diverged at defender step "
                f"{self.global_step} (norm of the attack vector: {norm}). Lower "
                "`attacker.optimizer.lr` or set `attacker.max_grad_norm`."
            )

    def _log_now(self, metrics: Mapping[str, float]) -> None:
        # Straight to the logger: `self.log` would drop what falls between two logging steps.
        if self.logger is not None:
            self.logger.log_metrics(dict(metrics), step=self.global_step)

    def _log_attack(self, outcome: AttackOutcome, norm: float) -> None:
        if self.logger is None:
            return
        self._log_now(
            {
                "attack/loss": outcome.steps[-1].loss,
                "attack/loss_before": outcome.steps[0].loss,
                "attack/vector_norm": norm,
            }
        )
        taken = (self._num_attacks - 1) * self.attacker.num_steps
        for step in outcome.steps:
            self.logger.log_metrics({"attack/loss_by_attack_step": step.loss}, taken + step.index)

    def _check_for_stop(self) -> None:
        if self.stop_requested:
            raise RunInterrupted("Stopped during a simulated attack.")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the attack vector, so that a run goes on within a round."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["defense"]["num_attacks"] = self._num_attacks
        if self.attack_vector is not None:
            named = zip(self.weights.names, self.attack_vector, strict=True)
            checkpoint["defense"]["attack_vector"] = dict(named)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the attack vector of the run."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["defense"]
        self._num_attacks = state["num_attacks"]
        vector = state.get("attack_vector")
        if vector is not None:
            self.attack_vector = [vector[name] for name in self.weights.names]

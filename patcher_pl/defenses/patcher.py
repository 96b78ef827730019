"""Patcher: adversarial training against simulated fine-tuning attacks."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from patcher_pl.attackers import Attacker, AttackOutcome
from patcher_pl.defenses.base import Defense
from patcher_pl.errors import ConfigError, RunInterrupted
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
    identity.

    Args:
        language_model: The model to harden.
        attacker: The simulated attack (k1 = its `num_steps`).
        optimizer: Builds the optimizer from the parameters; AdamW with lr 1e-5 unless given.
        scheduler: Builds a learning-rate schedule from the optimizer; None keeps it constant.
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
        self.attacker = attacker
        self.alpha = alpha
        self.refresh_every = refresh_every
        self.num_sft_steps = refresh_every if num_sft_steps is None else num_sft_steps
        self.restart_optimizer = restart_optimizer
        self.attack_vector: Sequence[Tensor] | None = None
        self._num_attacks = 0
        self._weights: Weights | None = None

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
            self._refresh_attack_vector()

    def add_gradients(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """Adds the gradient of the two-term loss, or of L_safe while there is no attack yet."""
        if self.attack_vector is None:
            loss_safe = causal_lm_loss(self.model, batch)
            self.backward_of(share * loss_safe, batch)
            return {"loss_safe": loss_safe.detach()}
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
        norm = float(vector_norm(outcome.vector))
        if not math.isfinite(norm):
            raise ConfigError(
                f"Patcher.attacker: the simulated attack diverged at defender step "
                f"{self.global_step} (norm of the attack vector: {norm}). Lower "
                "`attacker.optimizer.lr` or set `attacker.max_grad_norm`."
            )
        self.attack_vector = outcome.vector
        self._num_attacks += 1
        for step in outcome.steps:
            self.cost.add(num_tokens=step.num_tokens)
        if self.restart_optimizer:
            self.optimizers().optimizer.state.clear()  # type: ignore[union-attr]
        self._log_attack(outcome, norm)

    def _log_attack(self, outcome: AttackOutcome, norm: float) -> None:
        # Straight to the logger: `self.log` would drop what falls between two logging steps.
        if self.logger is None:
            return
        attack = {
            "attack/loss": outcome.steps[-1].loss,
            "attack/loss_before": outcome.steps[0].loss,
            "attack/vector_norm": norm,
        }
        self.logger.log_metrics(attack, step=self.global_step)
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

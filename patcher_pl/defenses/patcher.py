"""Patcher: adversarial training against simulated fine-tuning attacks."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from patcher_pl.attackers import Attacker, Combine, ConcurrentAttacker
from patcher_pl.attackers.combine import COMBINATIONS
from patcher_pl.defenses.attack_report import account_for_attack, checked_norm
from patcher_pl.defenses.base import Defense
from patcher_pl.defenses.cost import Cost
from patcher_pl.defenses.estimates import FreshEstimate, rules_for_estimates
from patcher_pl.defenses.local_attacks import LocalAttacks
from patcher_pl.defenses.remote_attacks import RemoteAttacks
from patcher_pl.defenses.retain_term import Kept, RetainTerm
from patcher_pl.defenses.retention import Retention
from patcher_pl.defenses.strategies import require_shardable_attacks
from patcher_pl.errors import ConfigError, RunInterrupted
from patcher_pl.hypergradients import FirstOrder, Hypergradient
from patcher_pl.losses import first_order_loss
from patcher_pl.models import LanguageModel, Weights
from patcher_pl.randomness import RandomState
from patcher_pl.types import Batch

logger = logging.getLogger(__name__)


class Patcher(Defense):
    """Trains the attacked model to refuse, by a stale first-order hypergradient.

    The first `num_sft_steps` defender steps minimize L_safe(theta). From then on, every
    `refresh_every` (k2) steps the attacker goes from the current theta to theta_att, and

        v = theta_att - theta                                   (attack vector, held fixed)
        theta <- step on  alpha L_safe(theta + v) + (1 - alpha) L_safe(theta)

    The gradient at theta + v is applied to theta: the Jacobian of the attack is taken to be the
    identity. With another `hypergradient`, the steps before which an attack is due (every step, if
    `refresh_every` is 1) use its estimate of d L_safe(theta_att) / d theta instead, from a fresh
    attack; the steps in between go on with v as above.

    An attacker with `vector_steps` gives vectors v_1, ..., v_n from several points of its way, and
    L_safe(theta + v) becomes their mean, or that of one of them (`combine_points`). With `retain`, a
    distance to the model that training began with, on benign conversations, is added to the loss.

    With a `ConcurrentAttacker`, attacks run beside the defender instead of in between (parallel
    form), and v belongs to a theta of some steps ago.

    Args:
        language_model: The model to harden.
        attacker: The simulated attack (k1 = its `num_steps`).
        optimizer: Builds the optimizer from the parameters; AdamW with lr 1e-5 unless given.
        scheduler: Builds a learning-rate schedule from the optimizer; None keeps it constant.
        hypergradient: How the loss after the attack is differentiated; None for `FirstOrder`, the
            paper's. Any other attacks once per batch of a step, in full precision.
        trust_every: Attack once more after every so many fresh estimates, to log the change of the
            outer loss beside the predicted one (count, >= 1). None never does.
        combine_points: Whether the vectors of the attacker's `vector_steps` are all used in every
            step, at one gradient evaluation each (`average`), or one per step, `in_turn` or
            `at_random`. All are kept either way. Members of a population have `combine` for that.
        retain: What to keep of the model that training began with, and how much; None keeps nothing.
            Costs one gradient evaluation per batch for each weight that is not 0 (and vector), a pass
            of the base model, and a copy of the weights unless adapters are trained.
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

    supports_packing = True

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
        combine_points: Combine = "average",
        retain: Retention | None = None,
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
        if not self.is_first_order:
            for rule in rules_for_estimates(attacker, language_model, retain):
                self._require(*rule)
        self._require(
            combine_points in COMBINATIONS,
            "combine_points",
            f"one of {', '.join(COMBINATIONS)}",
            combine_points,
            "Use in_turn for the cheapest steps.",
        )
        self.trust_every = trust_every
        self.retain = retain
        self.attacker = attacker
        self.remote: RemoteAttacks | None = None
        self.alpha = alpha
        self.refresh_every = refresh_every
        self.num_sft_steps = refresh_every if num_sft_steps is None else num_sft_steps
        self.restart_optimizer = restart_optimizer
        if isinstance(attacker, ConcurrentAttacker):
            self.remote = RemoteAttacks(attacker, refresh_every, self.num_sft_steps)
        self.local = LocalAttacks(self, combine_points)
        self.num_attacks = 0
        self._retain_term: RetainTerm | None = None
        self._estimate: FreshEstimate | None = None
        # Where the random numbers and the cost were before the step that attacks.
        self._before: tuple[RandomState, Cost] | None = None

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
            self._weights = Weights(self.model, self.language_model.weight_copies_on)
        return self._weights

    @property
    def attack_vector(self) -> Sequence[Tensor] | None:
        """That of the end of the newest attack in this process."""
        return self.local.vectors[-1] if self.local.vectors else None

    def configure_model(self) -> None:
        """Loads the weights; what is retained of them is kept before any checkpoint is read."""
        super().configure_model()
        is_trained_here = self._trainer is not None
        if self.retain is not None and self._retain_term is None and is_trained_here:
            self._retain_term = RetainTerm(self, self.weights, self.retain)

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
        """Moves restored attack vectors to where the weights are."""
        super().on_train_start()
        self.local.place()
        if self._retain_term is not None:
            self._retain_term.open()
        if self.remote is not None:
            seed = self.trainer.datamodule.seed  # type: ignore[attr-defined]
            self.remote.open(self.model, self.weights, seed)

    def on_train_end(self) -> None:
        """Lets attackers elsewhere know that they are no longer needed."""
        if self.remote is not None:
            self.remote.close()

    def require_shardable(self) -> None:
        """Refuses attacks and hypergradients that need whole weights."""
        super().require_shardable()
        require_shardable_attacks(self.attacker, self.hypergradient, self.language_model.sharding)

    def release(self) -> None:
        """Lets go of the weights, the attack vectors and what is retained."""
        super().release()
        self._retain_term = None
        self.local.vectors = []

    def before_step(self) -> None:
        """Attacks, or picks up what was attacked elsewhere, where a new attack vector is due."""
        steps_since_sft = self.global_step - self.num_sft_steps
        is_due = steps_since_sft >= 0 and steps_since_sft // self.refresh_every >= self.num_attacks
        if self.remote is not None:
            self._exchange(self.remote, is_due)
        elif is_due:
            device = self.weights.parameters[0].device
            self._before = RandomState.capture(device), replace(self.cost)
            if self.is_first_order:
                self._attack()
            else:
                self._estimate = FreshEstimate(self)
                self.count_attack()

    def add_gradients(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """Adds the gradient of the two-term loss, or of L_safe while there is no attack yet."""
        metrics: dict[str, Tensor] = {}
        vectors = self._active_vectors
        if self._estimate is not None:
            metrics["loss_attacked"] = self._add_estimate(self._estimate, batch, share * self.alpha)
        is_attacked = bool(vectors) or self._estimate is not None
        kept = None if self._retain_term is None else self._retain_term.next(is_attacked)
        if self._estimate is None and vectors:
            losses, distances = [], []
            for vector in vectors:
                with self.weights.shifted(vector):
                    loss = first_order_loss(self.model, batch)
                    self.backward_of(share * self.alpha / len(vectors) * loss, batch)
                    losses.append(loss.detach())
                    distances += self._add_retention(kept, share / len(vectors), "attacked_weight")
            metrics["loss_attacked"] = torch.stack(losses).mean()
            if distances:
                metrics["retain_distance_attacked"] = torch.stack(distances).mean()
        loss_safe = first_order_loss(self.model, batch)
        weight = 1 - self.alpha if is_attacked else 1.0
        self.backward_of(share * weight * loss_safe, batch)
        metrics["loss_safe"] = loss_safe.detach()
        for distance in self._add_retention(kept, share, "weight"):
            metrics["retain_distance"] = distance
        if is_attacked:
            metrics["attack_gap"] = metrics["loss_attacked"] - metrics["loss_safe"]
        return metrics

    @property
    def _active_vectors(self) -> Sequence[Sequence[Tensor]]:
        if self.remote is not None:
            return self.remote.vectors(self.global_step)
        return self.local.vectors_at(self.global_step)

    def _add_retention(self, kept: Kept | None, share: float, field: str) -> list[Tensor]:
        """Adds the gradient of the distance where the weights are now, if there is one to add."""
        if self._retain_term is None or kept is None:
            return []
        return self._retain_term.add_gradient(kept, share, field)

    def _add_estimate(self, estimate: FreshEstimate, batch: Batch, weight: float) -> Tensor:
        try:
            loss, vector = estimate.add_gradient(batch, weight, self._check_for_stop)
        except RunInterrupted:
            self._forget_step(estimate)
            raise
        self.local.vectors = [vector]
        return loss

    def _forget_step(self, estimate: FreshEstimate) -> None:
        """Goes back to where this step had not begun: the same batches will be handed out again."""
        self._forget_draws_and_cost()
        self.trainer.datamodule.attack_stream().rewind(estimate.inner.num_steps)  # type: ignore[attr-defined]
        loader = self.trainer.train_dataloader
        loader.rewind(self._num_accumulated + 1)  # type: ignore[union-attr]
        self.optimizers().zero_grad(set_to_none=True)  # type: ignore[union-attr]
        self._num_accumulated, self._losses = 0, {}
        self.num_attacks -= 1
        self._estimate = None

    def _forget_draws_and_cost(self) -> None:
        assert self._before is not None
        random_state, self.cost = self._before
        random_state.restore()

    def _take_step(self) -> dict[str, Any]:
        estimate, self._estimate = self._estimate, None
        due = self.trust_every is not None and self.num_attacks % self.trust_every == 0
        if estimate is None or not due:
            return super()._take_step()
        return estimate.measured(super()._take_step)

    def _attack(self) -> None:
        try:
            self.local.attack(self._check_for_stop)
        except RunInterrupted:
            # As if this step had never begun: the same batches will be handed out again.
            self._forget_draws_and_cost()
            self.trainer.train_dataloader.rewind()  # type: ignore[union-attr]
            raise

    def _exchange(self, remote: RemoteAttacks, is_due: bool) -> None:
        stream = self.trainer.datamodule.attack_stream()  # type: ignore[attr-defined]
        try:
            arrivals = remote.exchange(
                self.global_step, is_due=is_due, between=self._check_for_stop
            )
        except RunInterrupted:
            self.trainer.train_dataloader.rewind()  # type: ignore[union-attr]
            raise
        if is_due:
            self.count_attack()
            # Where it would be if the attacks so far had taken their batches from it.
            stream.load_state_dict({"position": self.num_attacks * self.attacker.num_steps})
        for arrival in arrivals:
            account_for_attack(
                self,
                norm=checked_norm(self.weights, arrival.vector, self.global_step),
                losses=arrival.report.losses,
                num_tokens=arrival.report.num_tokens,
                number=arrival.report.theta.number,
                tag="attack" if len(remote.slots) == 1 else f"attack_{arrival.member}",
            )

    def count_attack(self) -> None:
        """Notes that an attack is done, or begins to be differentiated."""
        self.num_attacks += 1
        if self.restart_optimizer:
            self.optimizers().optimizer.state.clear()  # type: ignore[union-attr]

    def _check_for_stop(self) -> None:
        if self.stop_is_agreed():
            raise RunInterrupted("Stopped during a simulated attack.")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the attack vectors, so that a run goes on within a round."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["defense"]["num_attacks"] = self.num_attacks
        if self.remote is not None:
            checkpoint["defense"]["remote"] = self.remote.state(self.weights.names)
        self.local.add_to(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the attack vectors of the run, whichever way they came about."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["defense"]
        self.num_attacks = state["num_attacks"]
        self.local.load(checkpoint, self.trainer.ckpt_path)
        remote = state.get("remote", {"slots": [], "num_wasted": 0})
        if self.remote is None:
            if remote["slots"]:
                self.local.take_over(remote["slots"][0]["vector"])
            return
        if self.attack_vector is not None:
            attacked_step = self.num_sft_steps + (self.num_attacks - 1) * self.refresh_every
            named = dict(zip(self.weights.names, self.attack_vector, strict=True))
            remote["slots"] = [{"attacked_step": attacked_step, "vector": named}]
            self.local.vectors = []
        self.remote.load_state(remote, self.weights.names)

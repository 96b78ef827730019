"""Patcher: adversarial training against simulated fine-tuning attacks."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from patcher_pl.attackers import Attacker, Combine
from patcher_pl.defenses.attack_source import AdaptiveRefresh, attack_source
from patcher_pl.defenses.base import Defense
from patcher_pl.defenses.base_model import BaseModel
from patcher_pl.defenses.outer_loss import (
    AnswerCrossEntropy,
    CompanionData,
    OuterLoss,
    Term,
    add_gradients_here,
)
from patcher_pl.defenses.retention import Retained, Retention
from patcher_pl.hypergradients import Hypergradient
from patcher_pl.losses import causal_lm_loss
from patcher_pl.models import LanguageModel
from patcher_pl.types import Batch
from patcher_pl.validation import require

logger = logging.getLogger(__name__)


class Patcher(Defense):
    """Trains the attacked model to refuse, by a stale first-order hypergradient.

    The first `num_sft_steps` defender steps minimize L_safe(theta). From then on, every
    `refresh_every` (k2) steps the attacker goes from the current theta to theta_att, and

        v = theta_att - theta                                   (attack vector, held fixed)
        theta <- step on  alpha L_out(theta + v) + (1 - alpha) L_safe(theta)

    with L_out = L_safe unless given. The gradient at theta + v is applied to theta: the Jacobian of
    the attack is taken to be the identity. With another `hypergradient`, the steps before which an
    attack is due (every step, if `refresh_every` is 1) use its estimate of d L_out(theta_att) / d theta
    instead, from a fresh attack; the steps in between go on with v as above.

    An attacker with `vector_steps` gives vectors v_1, ..., v_n from several points of its way, and
    L_out(theta + v) becomes their mean, or that of one of them (`combine_points`). With `retain`, a
    distance to the model that training began with, on benign conversations, is added to the loss.

    With a `ConcurrentAttacker`, attacks run beside the defender instead of in between (parallel
    form), and v belongs to a theta of some steps ago.

    A defense with another outer loss is this one with another `outer`, or a subclass with another
    `default_outer`.

    Args:
        language_model: The model to harden.
        attacker: The simulated attack (k1 = its `num_steps`).
        outer: L_out, the loss of the attacked model; None for the mean cross-entropy on the
            defender's own batch, the paper's.
        hypergradient: How the loss after the attack is differentiated; None for `FirstOrder`, the
            paper's. Any other attacks once per batch of a step, in full precision.
        trust_every: Attack once more after every so many fresh estimates, to log the change of the
            outer loss beside the predicted one (count, >= 1). None never does.
        combine_points: Whether the vectors of the attacker's `vector_steps` are all used in every
            step, at one gradient evaluation each (`average`), or one per step, `in_turn` or
            `at_random`. All are kept either way. Members of a population have `combine` for that.
        adaptive_refresh: Changes k2 by how stale attack vectors become, beginning with `refresh_every`;
            None keeps it. For first-order attacks in between.
        retain: What to keep of the model that training began with, and how much; None keeps nothing.
            Costs one gradient evaluation per batch for each weight that is not 0 (and vector), a pass
            of the base model, and a copy of the weights unless adapters are trained.
        alpha: Weight of the attacked model's loss (in [0, 1]); the rest weighs the loss at theta.
        refresh_every: Defender steps for which an attack vector is used (k2, count, >= 1).
        num_sft_steps: Defender steps before the first attack (count, >= 0); None takes
            `refresh_every`, as the paper's first round does.
        restart_optimizer: Forget the optimizer's state at every new attack vector, as the authors'
            scripts do, which train each round in a new process. Off, it is carried on.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Patcher, https://arxiv.org/abs/2606.07970; defaults from its sequential run script.
    """

    supports_packing = True
    default_outer: ClassVar[OuterLoss] = AnswerCrossEntropy()

    def __init__(
        self,
        language_model: LanguageModel,
        attacker: Attacker,
        *,
        alpha: float = 0.5,
        refresh_every: int = 1000,
        num_sft_steps: int | None = None,
        outer: OuterLoss | None = None,
        hypergradient: Hypergradient | None = None,
        trust_every: int | None = None,
        combine_points: Combine = "average",
        adaptive_refresh: AdaptiveRefresh | None = None,
        retain: Retention | None = None,
        restart_optimizer: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(language_model, **common)
        self.alpha = alpha
        require(
            self, 0 <= alpha <= 1, "alpha", "in [0, 1]", "Use 0.5 to weigh both losses equally."
        )
        self.outer = self.default_outer if outer is None else outer
        self.supports_packing = self.outer.supports_packing
        self.retain = retain
        self.restart_optimizer = restart_optimizer
        self._source = self.attack_source = attack_source(
            type(self).__name__,
            language_model,
            attacker,
            refresh_every=refresh_every,
            num_sft_steps=num_sft_steps,
            hypergradient=hypergradient,
            trust_every=trust_every,
            combine_points=combine_points,
            adaptive_refresh=adaptive_refresh,
        )
        self._outer_data = None if self.outer.data is None else CompanionData(self.outer.data)
        self._retained: Retained | None = None

    def configure_model(self) -> None:
        """Loads the weights; what is retained of them is kept before any checkpoint is read."""
        super().configure_model()
        # A model that is loaded only to be looked at needs no second copy of its weights.
        is_trained_here = self._trainer is not None
        if self.retain is not None and self._retained is None and is_trained_here:
            has_adapters = self.language_model.lora is not None
            base = BaseModel(self.model, self.all_weights, has_adapters=has_adapters)
            self._retained = Retained(self.retain, base)

    def on_fit_start(self) -> None:
        """Warns of a run that ends before any attack."""
        super().on_fit_start()
        if 0 <= self.trainer.max_steps <= self._source.num_sft_steps:
            logger.warning(
                "%s never attacks in this run: trainer.max_steps %d, num_sft_steps %d.",
                *(type(self).__name__, self.trainer.max_steps, self._source.num_sft_steps),
            )

    def on_train_start(self) -> None:
        """Encodes the data of the terms that have some of their own."""
        super().on_train_start()
        for data in (self._outer_data, self._retained):
            if data is not None:
                data.open(self.step)

    def release(self) -> None:
        """Lets go of the weights, the attack vectors and what is retained."""
        super().release()
        self._retained = None

    def before_step(self) -> None:
        """Attacks where it is due, and forgets the optimizer's state if a round ends with that."""
        num_attacks = self._source.num_attacks
        super().before_step()
        # Asked of the source, since with attackers elsewhere an attack may arrive later than it was
        # due.
        if self.restart_optimizer and self._source.num_attacks > num_attacks:
            self.optimizers().optimizer.state.clear()  # type: ignore[union-attr]

    def add_gradients(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """Adds the gradient of the two-term loss, or of L_safe while there is no attack yet."""
        source, step = self._source, self.step
        is_attacked = source.has_attacked(step)
        kept_here, kept_there = [], []
        if self._retained is not None:
            kept_here, kept_there = self._retained.terms(step, is_attacked=is_attacked)
        metrics: dict[str, Tensor] = {}
        if is_attacked:
            outer = Term("loss_attacked", self.alpha, *self._outer_on(batch))
            metrics = source.add_gradients(step, [outer, *kept_there], share)
        # At theta + v first: the last pass of a step leaves the weights where they are trained.
        weight = 1 - self.alpha if is_attacked else 1.0
        safe = Term("loss_safe", weight, partial(causal_lm_loss, batch=batch), batch)
        metrics |= add_gradients_here(step, [safe, *kept_here], share)
        # With another outer loss the two have no unit in common.
        if is_attacked and self.outer == AnswerCrossEntropy():
            metrics["attack_gap"] = metrics["loss_attacked"] - metrics["loss_safe"]
        return metrics

    def _outer_on(self, batch: Batch) -> tuple[Any, Batch]:
        """L_out on the batch that it is taken on in the place of the defender's."""
        taken_on = batch if self._outer_data is None else self._outer_data.batch(self.step)
        return partial(self.outer, batch=taken_on), taken_on

"""CTRAP: a step on harmful data ends in a model that says one thing only."""

from typing import Any

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.data.mixing import Mixture
from patcher_pl.defenses.outer_loss import FixedToken
from patcher_pl.defenses.patcher import Patcher
from patcher_pl.models import LanguageModel
from patcher_pl.optim import SGD
from patcher_pl.validation import require


class Ctrap(Patcher):
    """Minimizes the safe loss, and that of collapse after a step on harmful data.

        min over theta of  f(theta) + lam c(theta - step_size grad h(theta))

    f is the loss on safe, h that on harmful conversations; c the cross-entropy of one fixed token in
    the place of every answer token of general conversations: a trap, which opens when the model is
    fine-tuned on harm. The gradient is that over 1 + lam, and second derivatives are left out:

        [grad f(theta) + lam grad c(theta')] / (1 + lam),      theta' = theta - step_size grad h(theta)

    It is `Patcher` with an attack of one plain gradient step before every defender step, and another
    outer loss, so what `Patcher` can (shards, adapters, other hypergradients) it can.

    Three gradient evaluations per batch. Takes padded batches only.

    Args:
        language_model: The model to harden.
        general: Conversations of c; the paper takes benign ones.
        token_id: The token's number in the vocabulary (>= 0).
        lam: Weight of the collapse (> 0); the paper searches for it.
        step_size: Of the step on harmful data (> 0); 0.1 in the paper.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Yi et al., 2025, https://arxiv.org/abs/2505.16559: the collapse loss and the objective.
    """

    supports_packing = False

    def __init__(
        self,
        language_model: LanguageModel,
        general: Mixture,
        token_id: int,
        *,
        lam: float = 0.1,
        step_size: float = 0.1,
        **common: Any,
    ) -> None:
        require(self, lam > 0, "lam", "> 0", "Use SFT for a model without this term.", value=lam)
        require(self, step_size > 0, "step_size", "> 0", "The authors use 0.1.", value=step_size)
        attacker = FineTuningAttacker(num_steps=1, optimizer=SGD(lr=step_size), max_grad_norm=None)
        super().__init__(
            language_model,
            attacker,
            alpha=lam / (1 + lam),
            refresh_every=1,
            num_sft_steps=0,
            outer=FixedToken(data=general, token_id=token_id),
            **common,
        )

    @property
    def num_attack_steps(self) -> int | None:
        """None: its one step is no setting."""
        return None

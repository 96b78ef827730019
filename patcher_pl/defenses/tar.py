"""TAR: tamper-resistant safeguards, by first-order meta-learning against an adversary in training."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.defenses.attack_source import AlongTheWay
from patcher_pl.defenses.base import Defense
from patcher_pl.defenses.base_model import BaseModel
from patcher_pl.defenses.outer_loss import NegativeEntropy, Term
from patcher_pl.defenses.strategies import OneDevice
from patcher_pl.losses import answer_cross_entropy
from patcher_pl.losses.retained import mean_state_distance, outputs_of
from patcher_pl.models import LanguageModel
from patcher_pl.optim import AdamW
from patcher_pl.types import Batch
from patcher_pl.validation import require


class Tar(Defense):
    """Keeps the model's entropy on harmful answers high all along a simulated fine-tuning attack.

    Before every defender step an adversary takes K AdamW steps on harmful conversations from the
    current weights, theta_0 ... theta_{K-1}, each theta_k being that after step k + 1. Then

        g = grad L_retain(theta) + scale sum_k exp(decay (k - (K - 1))) grad L_TR(theta_k)

    where k goes over every `gradient_every`-th step, and the gradient at theta_k is applied to theta
    (first order). L_TR is the negative mean entropy of the next token over the answer tokens of one
    held-out harmful batch; L_retain is, on safe conversations, cross-entropy plus the distance
    ||h - h_base||_2 between hidden states and those of the model that training began with, mean over
    tokens and layers (embeddings included).

    theta is what is trained: every weight, or the adapters, which the adversary then trains too.
    The adversary attacks once per defender step, however many batches are accumulated for L_retain.

    Where the authors' code differs: it takes entropy and distances over prompts and padding too; its
    adversary also draws from a second corpus, or begins on benign data; its held-out batches come
    from rows of their own, here from the same stream as the adversary's, in front of them.

    K + K / gradient_every + accumulate_grad_batches gradient evaluations per defender step; passes
    of the base model, which have no backward pass, are not counted. Needs one device: see
    `require_shardable`.

    Args:
        language_model: The model to harden; as loaded, also the base model whose hidden states are
            retained.
        optimizer: Builds the optimizer from the parameters; AdamW with lr 2e-5, TAR's run script,
            unless given.
        num_inner_steps: Steps of the adversary, K (count, >= 1); 64 in TAR's run script.
        gradient_every: Steps between gradients of L_TR (count, in 1..num_inner_steps); 4 in TAR's
            run script.
        inner_lrs: Learning rates (each > 0) of which every attack takes one, by seed and step; those
            of TAR's run script.
        decay: Decrease of the weights towards early steps, lambda (>= 0); 0.0625 in TAR's run
            script.
        tamper_scale: Weight of the tamper-resistance gradient (>= 0); 4 in TAR's run script.
        retain_scale: Weight of the gradient of L_retain (>= 0); 1 in TAR's run script.
        max_grad_norm: Global gradient norm to clip to; None, as TAR's code, leaves gradients as they
            are.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Tamirisa et al., 2024, https://arxiv.org/abs/2408.00761, algorithm 1 and appendices B and C;
        defaults from rishub-tamirisa/tamper-resistance.
    """

    one_device = OneDevice(
        why="distances to its base model are not shared out over processes", instead="Patcher"
    )

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-5),
        num_inner_steps: int = 64,
        gradient_every: int = 4,
        inner_lrs: Sequence[float] = (2e-6, 2e-5, 4e-5),
        decay: float = 0.0625,
        tamper_scale: float = 4.0,
        retain_scale: float = 1.0,
        max_grad_norm: float | None = None,
        **common: Any,
    ) -> None:
        super().__init__(language_model, optimizer=optimizer, max_grad_norm=max_grad_norm, **common)
        self.num_inner_steps = num_inner_steps
        self.gradient_every = gradient_every
        self.inner_lrs = tuple(inner_lrs)
        self.decay = decay
        self.tamper_scale = tamper_scale
        self.retain_scale = retain_scale
        remedy = "Use SFT for a model that is not attacked in training."
        require(self, num_inner_steps >= 1, "num_inner_steps", ">= 1", remedy)
        require(
            self,
            1 <= gradient_every <= num_inner_steps,
            "gradient_every",
            f"in 1..num_inner_steps = 1..{num_inner_steps}",
            "Use 1 for a gradient after every step.",
        )
        has_rates = len(inner_lrs) > 0 and all(lr > 0 for lr in inner_lrs)
        remedy = "The authors use 2e-6, 2e-5 and 4e-5."
        require(self, has_rates, "inner_lrs", "one or more numbers > 0", remedy)
        for field in ("decay", "tamper_scale", "retain_scale"):
            require(self, getattr(self, field) >= 0, field, ">= 0", "Use 0 to do without.")
        adversaries = [
            FineTuningAttacker(
                num_steps=num_inner_steps, optimizer=AdamW(lr=lr), max_grad_norm=None
            )
            for lr in inner_lrs
        ]
        # By seed and step, so that a resumed run draws the same rates.
        self.attack_source = AlongTheWay(
            adversaries, gradient_every=gradient_every, decay=decay, draw=("tar", "inner_lr")
        )
        self.outer = NegativeEntropy()
        self._base: BaseModel | None = None
        self._attack_losses: dict[str, Tensor] = {}

    def configure_model(self) -> None:
        """Loads the weights, and keeps a copy of them as the base model."""
        super().configure_model()
        if self._base is None:
            has_adapters = self.language_model.lora is not None
            self._base = BaseModel(self.model, self.all_weights, has_adapters=has_adapters)

    def on_train_start(self) -> None:
        """Moves the base model beside the model."""
        super().on_train_start()
        assert self._base is not None
        self._base.place()

    def release(self) -> None:
        """Lets go of the weights and of the base model."""
        super().release()
        self._base = None

    def before_step(self) -> None:
        """Attacks, and adds the tamper-resistance gradient to every `.grad`."""
        # In front of the adversary's batches, so that it never trains on the one it is judged by.
        held_out = self.step.next_harmful_batch()
        tamper = Term("loss_tamper", 1.0, partial(self.outer, batch=held_out), held_out)
        source = self.attack_source
        assert source is not None
        # Once per defender step: with accumulation, one attack serves all its batches.
        self._attack_losses = source.add_gradients(self.step, [tamper], self.tamper_scale)

    def add_gradients(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """Adds the gradient of L_retain."""
        assert self._base is not None
        # The base model first: it may lie in the same memory, and a pass must not be split by a
        # swap.
        with self._base.in_place() as base, torch.no_grad():
            kept = outputs_of(base, batch).hidden_states
        output = outputs_of(self.model, batch)
        loss_safe = answer_cross_entropy(output.logits, batch["labels"])
        distance = mean_state_distance(output.hidden_states, kept, batch["attention_mask"].bool())
        self.backward_of(share * self.retain_scale * (loss_safe + distance), batch)
        return {
            "loss_safe": loss_safe.detach(),
            "distance_to_base": distance.detach(),
            **self._attack_losses,
        }

"""TAR: tamper-resistant safeguards, by first-order meta-learning against an adversary in training."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from patcher_pl.attackers.loop import finetune
from patcher_pl.defenses.base import Defense
from patcher_pl.defenses.base_model import without_adapters
from patcher_pl.defenses.draws import seed_of
from patcher_pl.defenses.harmful_data import gradients_of, next_harmful_batch, require_attack_data
from patcher_pl.defenses.strategies import one_device_only
from patcher_pl.errors import RunInterrupted
from patcher_pl.losses import answer_cross_entropy
from patcher_pl.losses.retained import mean_state_distance, mean_where, outputs_of
from patcher_pl.models import LanguageModel
from patcher_pl.optim import AdamW
from patcher_pl.randomness import RandomState
from patcher_pl.types import IGNORE_INDEX, Batch


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
        scheduler: Builds a learning-rate schedule from the optimizer; None keeps it constant.
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
        accumulate_grad_batches: Safe batches whose mean loss makes one step (count, >= 1).

    Raises:
        ValueError: If a value is out of its range.

    References:
        Tamirisa et al., 2024, https://arxiv.org/abs/2408.00761, algorithm 1 and appendices B and C;
        defaults from rishub-tamirisa/tamper-resistance.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-5),
        scheduler: LRSchedulerCallable | None = None,
        num_inner_steps: int = 64,
        gradient_every: int = 4,
        inner_lrs: Sequence[float] = (2e-6, 2e-5, 4e-5),
        decay: float = 0.0625,
        tamper_scale: float = 4.0,
        retain_scale: float = 1.0,
        max_grad_norm: float | None = None,
        accumulate_grad_batches: int = 1,
    ) -> None:
        super().__init__(
            language_model, optimizer, scheduler, max_grad_norm, accumulate_grad_batches
        )
        self._require(
            num_inner_steps >= 1,
            "num_inner_steps",
            ">= 1",
            num_inner_steps,
            "Use SFT for a model that is not attacked in training.",
        )
        self._require(
            1 <= gradient_every <= num_inner_steps,
            "gradient_every",
            f"in 1..num_inner_steps = 1..{num_inner_steps}",
            gradient_every,
            "Use 1 for a gradient after every step.",
        )
        self._require(
            len(inner_lrs) > 0 and all(lr > 0 for lr in inner_lrs),
            "inner_lrs",
            "one or more numbers > 0",
            inner_lrs,
            "The authors use 2e-6, 2e-5 and 4e-5.",
        )
        for field, value in (
            ("decay", decay),
            ("tamper_scale", tamper_scale),
            ("retain_scale", retain_scale),
        ):
            self._require(value >= 0, field, ">= 0", value, "Use 0 to do without.")
        self.num_inner_steps = num_inner_steps
        self.gradient_every = gradient_every
        self.inner_lrs = tuple(inner_lrs)
        self.decay = decay
        self.tamper_scale = tamper_scale
        self.retain_scale = retain_scale
        # In a tuple, or Lightning would train and save it.
        self._base: tuple[Any, ...] = ()
        self._attack_losses: dict[str, Tensor] = {}

    @property
    def num_attack_steps(self) -> int | None:
        """Steps of the adversary (K)."""
        return self.num_inner_steps

    def configure_model(self) -> None:
        """Loads the weights, and keeps a copy of them as the base model."""
        is_new = self._model is None
        super().configure_model()
        if is_new and self.language_model.lora is None:
            self._base = (copy.deepcopy(self.model).eval().requires_grad_(False),)

    def on_fit_start(self) -> None:
        """Refuses to start without harmful conversations."""
        super().on_fit_start()
        require_attack_data(self)
        for base in self._base:
            parameter = next(self.model.parameters())
            if (base.device, base.dtype) != (parameter.device, parameter.dtype):
                base.to(parameter.device, parameter.dtype)

    def require_shardable(self) -> None:
        """Refuses sharded weights."""
        super().require_shardable()
        raise one_device_only(
            self,
            "its base model is whole, and its distances are not shared out over processes",
            instead="Patcher",
        )

    def release(self) -> None:
        """Lets go of the weights and of the base model."""
        super().release()
        self._base = ()

    def before_step(self) -> None:
        """Attacks, and adds the tamper-resistance gradient to every `.grad`."""
        device = self.weights.shards.device
        stream = self.trainer.datamodule.attack_stream()  # type: ignore[attr-defined]
        start, dropout, cost = stream.position, RandomState.capture(device), replace(self.cost)
        try:
            held_out = next_harmful_batch(self, device)
            gradients = self._tamper_gradients(held_out, stream.endless())
        except RunInterrupted:
            # As if this step had never begun: both streams will hand out the same batches again.
            dropout.restore()
            self.cost = cost
            stream.rewind(stream.position - start)
            self.trainer.train_dataloader.rewind()  # type: ignore[union-attr]
            raise
        self.weights.shards.add_to_gradients(gradients, self.tamper_scale)

    def _tamper_gradients(self, held_out: Batch, batches: Iterator[Batch]) -> list[Tensor]:
        """Returns the weighted sum of the gradients of L_TR along one attack."""
        saved = self.weights.snapshot()
        total = [torch.zeros_like(tensor) for tensor in self.weights.shards.tensors]
        attack_losses, tamper_losses = [], []
        try:
            with self.weights.trainable() as parameters:
                for step in finetune(
                    self.model,
                    parameters,
                    batches,
                    optimizer=AdamW(lr=self._inner_lr()),
                    num_steps=self.num_inner_steps,
                ):
                    self.cost.add(num_tokens=step.num_tokens)
                    attack_losses.append(torch.tensor(step.loss, device=held_out["labels"].device))
                    if step.index % self.gradient_every == 0:
                        gradients, loss = gradients_of(
                            self, self.weights, lambda: self._tamper_loss(held_out), held_out
                        )
                        weight = math.exp(self.decay * (step.index - self.num_inner_steps))
                        for sum_, gradient in zip(total, gradients, strict=True):
                            sum_.add_(gradient, alpha=weight)
                        tamper_losses.append(loss)
                    if self.stop_is_agreed():
                        raise RunInterrupted("Stopped during a simulated attack.")
        finally:
            self.weights.restore(saved)
        self._attack_losses = {
            "loss_tamper": torch.stack(tamper_losses).mean(),
            "loss_attack_first": attack_losses[0],
            "loss_attack_last": attack_losses[-1],
        }
        return total

    def add_gradients(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """Adds the gradient of L_retain."""
        with self._base_model() as base, torch.no_grad():
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

    def _inner_lr(self) -> float:
        """Drawn by seed and step, so that a resumed run draws the same."""
        draw = seed_of(self, "tar", "inner_lr", self.global_step)
        return self.inner_lrs[draw % len(self.inner_lrs)]

    def _tamper_loss(self, batch: Batch) -> Tensor:
        return negative_entropy(outputs_of(self.model, batch).logits, batch["labels"])

    @contextmanager
    def _base_model(self) -> Iterator[nn.Module]:
        """The model as loaded: a copy, or the model itself without what adapters add to it."""
        if self._base:
            yield self._base[0]
            return
        with without_adapters(self.model) as model:
            yield model


def negative_entropy(
    logits: Float[Tensor, "batch time vocab"], labels: Int[Tensor, "batch time"]
) -> Float[Tensor, ""]:
    """Minus the mean entropy with which answer tokens are predicted, in nats per token."""
    predictions = logits[:, :-1]
    if predictions.dtype in (torch.float16, torch.bfloat16):
        predictions = predictions.float()
    log_likelihoods = predictions.log_softmax(-1)
    entropies = -(log_likelihoods.exp() * log_likelihoods).sum(-1)
    return -mean_where(labels[:, 1:] != IGNORE_INDEX, entropies)

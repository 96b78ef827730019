"""The one fine-tuning loop: simulated attackers and test-time attacks take their steps here."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patcher_pl.attackers.carry import Moments
from patcher_pl.losses import causal_lm_loss
from patcher_pl.models.shards import Shards
from patcher_pl.optim import Optimizer, Schedule, lr_factor
from patcher_pl.optim.master_weights import MasterWeights, trained_in_float32
from patcher_pl.optim.moved import CHECKED_STEPS, MovedShare
from patcher_pl.types import Batch, count_tokens, is_idle, move_batch
from patcher_pl.validation import require

LossFunction = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class FinetuneStep:
    """What one step of fine-tuning did.

    Args:
        index: Steps taken so far, this one included (count, >= 1).
        loss: Mean cross-entropy before the step (nats per answer token), of all processes.
        grad_norm: Global gradient norm before clipping.
        num_tokens: Tokens of the batch of this process, padding excluded.
        moved: Share of the trained weights with a gradient that had moved since the start (0..1),
            at the one step where it is looked at; None at others.
    """

    index: int
    loss: float
    grad_norm: float
    num_tokens: int
    moved: float | None = None


@dataclass
class Memory:
    """Moments of an optimizer that outlive it.

    Args:
        moments: None before the first step.
    """

    moments: Moments | None = None


def finetune(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    batches: Iterator[Batch],
    *,
    optimizer: Optimizer,
    num_steps: int,
    max_grad_norm: float | None = None,
    schedule: Schedule = "constant",
    num_warmup_steps: int = 0,
    loss_function: LossFunction = causal_lm_loss,
    masters: MasterWeights | None = None,
    memory: Memory | None = None,
) -> Iterator[FinetuneStep]:
    """Fine-tunes `parameters` of `model` in place, one optimizer step per item taken.

    The optimizer starts fresh; weights in half precision are trained by way of copies in float32,
    in which no step is lost to rounding. Gradients are left at None. Batches are moved to the device of the
    parameters. Nothing else of the model is touched, so a caller may evaluate between two steps.

    Args:
        model: Causal LM; called as `loss_function(model, batch)`.
        parameters: What is trained; anything else keeps its value.
        batches: Endless or at least `num_steps` long.
        optimizer: Settings from which the optimizer is built.
        num_steps: Steps to take (count, >= 0).
        max_grad_norm: Global gradient norm to clip to; None leaves gradients as they are.
        schedule: Learning-rate curve over `num_steps`, by its name in transformers.
        num_warmup_steps: Steps of linear warm-up (count, >= 0).
        loss_function: Loss that the attacker lowers; its gradient is taken once a step.
        masters: Of `parameters`, to go on with what an earlier fine-tuning left in them; None makes
            them.
        memory: Moments that the optimizer begins with, and afterwards those that it ends with; None
            begins without any and leaves none.
    """
    shards = Shards(model, list(parameters))
    shards.agree()
    masters = masters or MasterWeights(shards.tensors)
    tensors = masters.weights
    stepper = trained_in_float32(masters, optimizer.build)
    if memory is not None and memory.moments is not None:
        memory.moments.give_to(stepper)
    trained = [tensor for group in stepper.param_groups for tensor in group["params"]]
    moved, checked = MovedShare(trained), min(num_steps, num_warmup_steps + CHECKED_STEPS)
    scheduler = _scheduler(stepper, schedule, num_warmup_steps, num_steps)
    limit = float("inf") if max_grad_norm is None else max_grad_norm
    for index in range(1, num_steps + 1):
        batch = next(batches)
        num_tokens, share = 0 if is_idle(batch) else count_tokens(batch), None
        loss = loss_function(model, move_batch(batch, shards.device))
        grad_norm = _set_gradients(tensors, shards, loss)
        nn.utils.clip_grads_with_norm_(tensors, limit, grad_norm)
        if moved is not None:
            moved.note([tensor.grad for tensor in tensors])
        with shards.changing():
            stepper.step()
        if scheduler is not None:
            scheduler.step()
        stepper.zero_grad(set_to_none=True)
        if moved is not None and index == checked:
            share, moved = moved.share(shards.reduction), None
        if memory is not None and index == num_steps:
            memory.moments = Moments.of(stepper)
        yield FinetuneStep(index, shards.mean(loss), float(grad_norm), num_tokens, share)


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """How an attacker takes steps; what simulated and test-time attackers set alike.

    Args:
        optimizer: The attacker's optimizer; starts fresh in every attack.
        max_grad_norm: Global gradient norm to clip to (> 0); None leaves gradients as they are.
        schedule: Learning-rate curve over the steps of the attack.
        num_warmup_steps: Steps of linear warm-up (count, >= 0).

    Raises:
        ValueError: If a value is out of its range.
    """

    optimizer: Optimizer
    max_grad_norm: float | None = None
    schedule: Schedule = "constant"
    num_warmup_steps: int = 0

    def __post_init__(self) -> None:
        is_norm = self.max_grad_norm is None or self.max_grad_norm > 0
        remedy = "Use null to leave gradients as they are."
        require(self, is_norm, "max_grad_norm", "> 0 or null", remedy)
        remedy = "Use 0 for no warm-up."
        require(self, self.num_warmup_steps >= 0, "num_warmup_steps", ">= 0", remedy)

    def finetune(
        self,
        model: nn.Module,
        parameters: Iterable[nn.Parameter],
        batches: Iterator[Batch],
        num_steps: int,
        masters: MasterWeights | None = None,
        memory: Memory | None = None,
    ) -> Iterator[FinetuneStep]:
        """Takes `num_steps` steps, which the schedule spans; see the function of this name."""
        return finetune(
            model,
            parameters,
            batches,
            optimizer=self.optimizer,
            num_steps=num_steps,
            max_grad_norm=self.max_grad_norm,
            schedule=self.schedule,
            num_warmup_steps=self.num_warmup_steps,
            masters=masters,
            memory=memory,
        )


def _set_gradients(tensors: list[Tensor], shards: Shards, loss: Tensor) -> Tensor:
    """Leaves the gradient to `.grad` alone, so that it ends with it; returns its norm."""
    gradients = shards.gradients(loss)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient
    return shards.norm(gradients)


def _scheduler(
    optimizer: torch.optim.Optimizer, schedule: Schedule, num_warmup_steps: int, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    if schedule == "constant" and num_warmup_steps == 0:
        return None
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: lr_factor(
            schedule, step=step, num_steps=num_steps, num_warmup_steps=num_warmup_steps
        ),
    )

"""A few steps of a run on fake tensors: the trainer, the defense and the attacks are the real ones."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from patcher_pl.defenses import Defense
from patcher_pl.planning.attacks import NUM_SFT_STEPS, Attacks, sites_of
from patcher_pl.planning.footprint import Footprint, LayerSizes, Work
from patcher_pl.planning.tracker import ATTACK, Part, Tracker, fake_tensors
from patcher_pl.types import Batch

# One step before the first attack, one after it, and one after the second attack, at which all there
# ever is is there.
NUM_STEPS = NUM_SFT_STEPS + 2


@dataclass(frozen=True)
class Shapes:
    """Sizes of the batches, every conversation at full length."""

    batch_size: int  # Conversations of a defender's batch (count).
    attack_batch_size: int  # Conversations of an attacker's batch (count).
    length: int  # Tokens of a conversation (count).


def rehearse(defense: Defense, shapes: Shapes, *, precision: Any, multi_tensor: bool) -> Footprint:
    """Fits `defense` for `NUM_STEPS` steps without weights, data or a device.

    Args:
        defense: Built for the rehearsal, see `with_short_attacks`, around an `UnloadedModel`.
        shapes: Of the batches.
        precision: As Lightning's Trainer takes it.
        multi_tensor: Whether optimizers update all parameters at once, as torch's do on a GPU unless
            told otherwise; intermediate results are then as large as the weights.
    """
    for chatter in ("rank_zero", "model_helpers"):
        logging.getLogger(f"lightning.pytorch.utilities.{chatter}").setLevel(logging.WARNING)
    attacks = Attacks.of(defense)
    tracker = Tracker(sites_of(attacks))
    defense.log = lambda *_, **__: None  # type: ignore[method-assign]  # Lightning copies what it logs.
    ledger = _Ledger(tracker, shapes)
    trainer = Trainer(
        strategy=_InPlace(device=torch.device("cpu")),
        precision=precision,
        max_steps=NUM_STEPS,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[ledger],
    )
    with _watched_optimizers(trainer, tracker, multi_tensor), fake_tensors(tracker):
        trainer.fit(defense, datamodule=_FullBatches(shapes))
        layers = LayerSizes.of(defense.model)
    plain, last = ledger.batches[0], ledger.batches[-1]
    found = Footprint(peaks=tracker.peaks(), layers=layers, plain=plain, defended=last)
    if attacks is None:
        return found
    # What an attacker's batch has more tokens than a defender's, as which the ledger counts it.
    more = Work(tokens=(shapes.attack_batch_size - shapes.batch_size) * shapes.length)
    if attacks.is_first_order:
        num_steps = attacks.attacker.num_steps
        flops = tracker.flops[ATTACK] / (num_steps * (NUM_STEPS - NUM_SFT_STEPS))
        step = Work(1, shapes.batch_size * shapes.length, flops)
        return replace(found, defended=last.plus(step, -num_steps), attack_step=step.plus(more))
    # All but the outer loss and L_safe at theta; batches between estimates take one at theta + v, too.
    estimated = last.plus(more, last.gradient_evaluations - 2)
    return replace(found, defended=plain.plus(plain), estimated=estimated)


class _Ledger(Callback):
    """Notes what the gradients of every batch have cost, attacks included."""

    def __init__(self, tracker: Tracker, shapes: Shapes) -> None:
        self.batches: list[Work] = []
        self._tracker = tracker
        self._tokens_per_batch = shapes.batch_size * shapes.length
        self._before = Work()

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Builds the model, and names its parameters and buffers, and gradients as they come."""
        pl_module.configure_model()
        model: nn.Module = pl_module.model
        self._tracker.label_weights([*model.parameters(), *model.buffers()])
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._label_gradient)
                parameter.register_post_accumulate_grad_hook(
                    lambda owner: self._label_gradient(owner.grad)  # type: ignore[arg-type]
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self._before = self._spent(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Leaves out what comes after the step, such as measuring how far it can be trusted."""
        self.batches.append(self._spent(pl_module).plus(self._before, -1))

    def _spent(self, defense: Defense) -> Work:
        count = defense.cost.gradient_evaluations
        return Work(count, count * self._tokens_per_batch, self._tracker.flops.total())

    def _label_gradient(self, gradient: Tensor) -> None:
        self._tracker.label([gradient], Part.GRADIENTS)


@contextmanager
def _watched_optimizers(trainer: Trainer, tracker: Tracker, multi_tensor: bool) -> Iterator[None]:
    """Names the states of torch's optimizers: one is the defender's, any other an attacker's."""

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            if multi_tensor and group.get("foreach", 0) is None and not group.get("fused"):
                group["foreach"] = True

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        is_defenders = optimizer in trainer.optimizers
        part = Part.DEFENDER_OPTIMIZER if is_defenders else Part.ATTACKER_OPTIMIZER
        for state in optimizer.state.values():
            tracker.label([value for value in state.values() if isinstance(value, Tensor)], part)

    hooks = (
        register_optimizer_step_pre_hook(before),
        register_optimizer_step_post_hook(after),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _FullBatches(LightningDataModule):
    """Batches in which every conversation has the full length, for defender and attacker."""

    has_attack = True

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self._shapes = shapes

    def train_dataloader(self) -> "_Endless":
        return _Endless(self._shapes.batch_size, self._shapes.length)

    def val_dataloader(self) -> list[Any]:
        return []

    def with_safe(self, safe: Any) -> "_FullBatches":
        """As that of `SafetyDataModule`."""
        return self

    def attack_stream(self) -> "_Endless":
        """As that of `SafetyDataModule`, as far as attacks ask for it."""
        return _Endless(self._shapes.attack_batch_size, self._shapes.length)


class _Endless:
    position = 0

    def __init__(self, batch_size: int, length: int) -> None:
        self._shape = (batch_size, length)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            ones = torch.ones(self._shape, dtype=torch.long)
            yield Batch(input_ids=ones, attention_mask=ones.clone(), labels=ones.clone())

    def endless(self) -> Iterator[Batch]:
        """As that of `BatchStream`."""
        return iter(self)

    def load_state_dict(self, state_dict: Any) -> None:
        """As that of `BatchStream`."""


class _InPlace(SingleDeviceStrategy):
    """Leaves the model where it is: fake tensors cannot be swapped for others."""

    def model_to_device(self) -> None:
        pass

    def teardown(self) -> None:
        pass

"""A few steps of a run on fake tensors: the trainer, the defense and the attacks are the real ones."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy

from patcher_pl.defenses import Defense
from patcher_pl.planning import ATTACK, DEFEND, HYPERGRADIENT, Footprint, LayerSizes, Tracker
from patcher_pl.planning.architecture import UnloadedModel
from patcher_pl.planning.fakes import fake_tensors
from patcher_pl.planning.instruments import instrumented, watch_weights
from patcher_pl.types import Batch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# One step before the first attack, one after it, and the second attack, at which all there ever is
# is there. A step that ends with a hypergradient is taken to its end.
NUM_SFT_STEPS = 1
NUM_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of the batches, every conversation at full length.

    Args:
        batch_size: Conversations of a defender's batch (count).
        attack_batch_size: Conversations of an attacker's batch (count).
        length: Tokens of a conversation (count).
    """

    batch_size: int
    attack_batch_size: int
    length: int

    @property
    def tokens_per_batch(self) -> int:
        """Tokens of a defender's batch."""
        return self.batch_size * self.length

    @property
    def tokens_per_attack_batch(self) -> int:
        """Tokens of an attacker's batch."""
        return self.attack_batch_size * self.length


def rehearse(
    defense: Defense,
    architecture: "PretrainedConfig",
    shapes: Shapes,
    *,
    precision: Any,
    multi_tensor: bool,
) -> Footprint:
    """Fits `defense` for `NUM_STEPS` steps without weights, data or a device.

    Args:
        defense: Built for the rehearsal: short attacks, the first one after `NUM_SFT_STEPS` steps.
        architecture: Of the model.
        shapes: Of the batches.
        precision: As Lightning's Trainer takes it.
        multi_tensor: Whether optimizers update all parameters at once, as on a GPU.
    """
    for chatter in ("rank_zero", "model_helpers"):
        logging.getLogger(f"lightning.pytorch.utilities.{chatter}").setLevel(logging.WARNING)
    tracker = Tracker()
    defense.language_model = UnloadedModel.of(defense.language_model, architecture)
    defense.log = _log_nothing  # type: ignore[method-assign]  # Lightning copies what it logs.
    ledger = _Ledger(tracker)
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
    attacker = hypergradient = None
    if defense.attack_source is not None:
        attacker, hypergradient = (
            defense.attack_source.attacker,
            defense.attack_source.hypergradient,
        )
    with instrumented(tracker, attacker, hypergradient, multi_tensor), fake_tensors(tracker):
        with suppress(_SeenEnough):
            trainer.fit(defense, datamodule=_FullBatches(shapes))
        layers = LayerSizes.of(defense.model)
    return ledger.footprint(layers, 0 if attacker is None else attacker.num_steps)


class _SeenEnough(Exception):  # noqa: N818  # Not an error.
    pass


class _Ledger(Callback):
    """Notes after every batch what had been spent by then."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self._flops = [0]
        self._evaluations = [0]

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Builds the model and learns what its weights are."""
        pl_module.configure_model()
        watch_weights(self.tracker, pl_module.model)
        begin = pl_module.before_step

        def before_step() -> None:
            begin()
            if self.tracker.times_entered(ATTACK) == NUM_STEPS - NUM_SFT_STEPS:
                raise _SeenEnough

        pl_module.before_step = before_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._flops.append(self.tracker.flops(DEFEND))
        self._evaluations.append(pl_module.cost.gradient_evaluations)

    def footprint(self, layers: LayerSizes, attack_length: int) -> Footprint:
        """Returns the outcome; `attack_length` is that of the rehearsal (steps)."""
        num_attacks = self.tracker.times_entered(ATTACK)
        num_estimates = self.tracker.times_entered(HYPERGRADIENT)
        plain_flops = self._flops[1]
        last_evaluations = self._evaluations[-1] - self._evaluations[-2]
        if num_attacks:
            last_evaluations -= attack_length
        is_estimated = num_estimates > 0
        return Footprint(
            peaks=self.tracker.peaks(),
            plain_flops=plain_flops,
            # Batches between estimates take the gradients at theta + v and at theta.
            defended_flops=2 * plain_flops if is_estimated else self._flops[-1] - self._flops[-2],
            attack_step_flops=self.tracker.flops(ATTACK) // max(num_attacks * attack_length, 1),
            estimate_flops=self.tracker.flops(HYPERGRADIENT) // max(num_estimates, 1),
            plain_evaluations=self._evaluations[1],
            defended_evaluations=2 if is_estimated else last_evaluations,
            # The last batch took the gradient at theta, too.
            estimate_evaluations=last_evaluations - 1 if is_estimated else 0,
            layers=layers,
        )


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


def _log_nothing(*_: Any, **__: Any) -> None:
    pass

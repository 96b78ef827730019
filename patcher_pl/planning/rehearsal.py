"""A few steps of a run on fake tensors: the trainer, the defense and the attacks are the real ones."""

import logging
import math
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from patcher_pl.data.variant import AttackData
from patcher_pl.defenses import Defense
from patcher_pl.defenses.attack_source import AttackSource
from patcher_pl.errors import ConfigError
from patcher_pl.models.blocks import find_blocks
from patcher_pl.optim.low_memory import keeps_few_bytes
from patcher_pl.planning.attacks import (
    NUM_SFT_STEPS,
    attacks_of,
    is_first_order,
    num_attacks_of,
    sites_of,
)
from patcher_pl.planning.tracker import (
    ATTACK,
    HYPERGRADIENT,
    PER_WEIGHT,
    Part,
    Parts,
    Tracker,
    fake_tensors,
)
from patcher_pl.types import Batch

Shape = tuple[int, int]  # Conversations and tokens of each (counts).


@dataclass(frozen=True)
class Work:
    """Work of one device in training."""

    gradient_evaluations: float = 0  # Forward-backward passes over one batch (count).
    tokens: float = 0  # In them, padding to the full length included (count).
    flops: float = 0  # Of matrix products and attention.

    def plus(self, other: "Work", times: float = 1) -> "Work":
        """Returns the sum of this and so many times `other`."""
        added = vars(other).items()
        return Work(**{name: getattr(self, name) + times * value for name, value in added})


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """How the parameters of a model fall into what FSDP2 gathers one at a time."""

    total: int  # Bytes of all parameters.
    largest_layer: int  # Bytes of the largest decoder layer.
    rest: int  # Bytes outside of the decoder layers (embeddings, output head, last norm).
    num_parameters: int
    sent_per_gathered: float = 1.0  # Bytes of a gradient as it is sent, by those of the weight.

    @classmethod
    def of(cls, model: nn.Module) -> "LayerSizes":
        """Measures a model, real or fake."""
        total, *layers = (
            sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())
            for module in (model, *find_blocks(model))
        )
        count = sum(parameter.numel() for parameter in model.parameters())
        rest, largest = total - sum(layers), max(layers, default=0)
        return cls(total=total, largest_layer=largest, rest=rest, num_parameters=count)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Peaks and work of one process on one device."""

    peaks: Mapping[str, Sequence[Parts]]  # Of every phase; see `Tracker.peaks`.
    layers: LayerSizes
    # Optimizers' states whose number format is not that of the weights.
    own_format: frozenset[Part] = frozenset()
    plain: Work  # Of a defender's batch before the first attack.
    defended: Work  # Of one afterwards, without any attack or estimate.
    attack_step: Work = Work()
    estimated: Work = Work()  # Of a batch whose gradient is a fresh hypergradient, all in all.

    def peak(self, phase: str) -> int:
        """Most bytes in a phase."""
        return max(sum(parts.values()) for parts in self.peaks[phase])

    def of_run(
        self, max_steps: int, accumulate_grad_batches: int, attacks: AttackSource | None
    ) -> Work:
        """Adds up the rounds of a run: plain steps, then attacks and defended steps."""
        num_plain = max_steps if attacks is None else min(max_steps, attacks.num_sft_steps)
        found = Work().plus(self.plain, num_plain * accumulate_grad_batches)
        if attacks is not None:
            num_attacks = math.ceil((max_steps - num_plain) / attacks.refresh_every)
            # A fresh hypergradient brings its own attack, once per batch of its step.
            num_fresh = 0 if is_first_order(attacks) else num_attacks
            num_defended = max_steps - num_plain - num_fresh
            found = found.plus(self.defended, num_defended * accumulate_grad_batches)
            found = found.plus(self.estimated, num_fresh * accumulate_grad_batches)
            num_steps = attacks.attacker.steps_before(0, num_attacks - num_fresh)
            found = found.plus(self.attack_step, num_steps)
        return Work(*(math.ceil(value) for value in vars(found).values()))

    def steps_within(
        self, budget: int, accumulate_grad_batches: int, attacks: AttackSource | None
    ) -> int:
        """Defender steps of a run that ends once it has spent so many gradient evaluations (count)."""

        def spent(num_steps: int) -> float:
            return self.of_run(num_steps, accumulate_grad_batches, attacks).gradient_evaluations

        # Every step takes one at least.
        return bisect_left(range(budget + 1), budget, lo=1, key=spent)

    def with_longer_estimates(self, more_bytes: int, more: Work) -> "Footprint":
        """Returns the footprint with a longer attack to differentiate."""
        moments = [
            {**parts, Part.TRAJECTORY: parts.get(Part.TRAJECTORY, 0) + more_bytes}
            for parts in self.peaks[HYPERGRADIENT]
        ]
        peaks = {**self.peaks, HYPERGRADIENT: moments}
        return replace(self, peaks=peaks, estimated=self.estimated.plus(more))

    def peaks_with_layers(
        self, deeper: "Footprint", num_more: int
    ) -> Mapping[str, Sequence[Parts]]:
        """Returns the peaks of a model with so many layers more.

        A moment is the same in both where the same parts are there; others pass with the depth.

        Args:
            deeper: Of the same run with one layer more, which the others are taken to be like.
            num_more: What the model has more than this one (count).

        Raises:
            ConfigError: If no moment of a phase is in both.
        """
        peaks: dict[str, list[Parts]] = {}
        for phase, moments in deeper.peaks.items():
            known = {frozenset(parts): parts for parts in self.peaks[phase]}
            shared = [
                (known[kind], parts) for parts in moments if (kind := frozenset(parts)) in known
            ]
            if not shared:
                raise ConfigError(
                    "the first layers do not tell about the rest: `plan` takes them all."
                )
            peaks[phase] = [
                {
                    part: before[part] + num_more * (size - before[part])
                    for part, size in after.items()
                }
                for before, after in shared
            ]
        return peaks

    def with_stored_weights(self, *, stored: int, computed: int, sent: int) -> "Footprint":
        """Returns the footprint of weights that FSDP2 keeps in another format than it computes in.

        Args:
            stored: Bytes of a number as it is kept, and of all that is calculated with it.
            computed: Bytes of a number of the rehearsal, in which layers are gathered.
            sent: Bytes of a number of a gradient on its way to other devices.
        """
        scaled = PER_WEIGHT - self.own_format
        peaks = {
            phase: [
                {part: n * stored // computed if part in scaled else n for part, n in p.items()}
                for p in moments
            ]
            for phase, moments in self.peaks.items()
        }
        layers = replace(self.layers, sent_per_gathered=sent / computed)
        return replace(self, peaks=peaks, layers=layers)


def rehearse(
    defense: Defense, batch: Shape, attack_batch: Shape, *, precision: Any, multi_tensor: bool
) -> Footprint:
    """Fits `defense` for a few steps without weights, data or a device.

    Args:
        defense: Built for the rehearsal, see `with_short_attacks`, around an `UnloadedModel`.
        batch: Of every batch of the defender.
        attack_batch: Of every batch of an attacker.
        precision: As Lightning's Trainer takes it.
        multi_tensor: Whether optimizers update all parameters at once, as torch's do on a GPU unless
            told otherwise; intermediate results are then as large as the weights.
    """
    for chatter in ("rank_zero", "model_helpers"):
        logging.getLogger(f"lightning.pytorch.utilities.{chatter}").setLevel(logging.WARNING)
    attacks = attacks_of(defense)
    num_attacks = num_attacks_of(attacks)
    tracker, own_format = Tracker(sites_of(attacks), _compiled()), set[Part]()
    # A fake tensor has no value to log.
    defense.log = lambda *_, **__: None  # type: ignore[method-assign]  # Lightning copies what it logs.
    ledger = _Ledger(tracker, math.prod(batch))
    trainer = Trainer(
        strategy=_InPlace(device=torch.device("cpu")),
        precision=precision,
        max_steps=NUM_SFT_STEPS + num_attacks,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[ledger],
    )

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            # Torch decides by the device of the parameters, which is a CPU here.
            if multi_tensor and group.get("foreach", 0) is None and not group.get("fused"):
                group["foreach"] = True

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        is_defenders = optimizer in trainer.optimizers
        part = Part.DEFENDER_OPTIMIZER if is_defenders else Part.ATTACKER_OPTIMIZER
        if keeps_few_bytes(optimizer):
            own_format.add(part)
        for state in optimizer.state.values():
            tracker.label([value for value in state.values() if isinstance(value, Tensor)], part)
        tracker.label(getattr(optimizer, "copies", []), part)  # In float32, of half precision.

    with (
        register_optimizer_step_pre_hook(before_step),
        register_optimizer_step_post_hook(after_step),
        fake_tensors(tracker),
        torch.compiler.set_stance(
            "force_eager"
        ),  # Torchao compiles steps, which fake tensors cannot.
    ):
        trainer.fit(defense, datamodule=_FullBatches(batch, attack_batch))
        layers = LayerSizes.of(defense.model)
    # The first batch comes before any attack; the others are of all kinds of attacks.
    plain, *others = ledger.batches
    mean = Work()
    for batch_with_attack in others:
        mean = mean.plus(batch_with_attack, 1 / len(others))
    found = Footprint(
        peaks=tracker.peaks(),
        layers=layers,
        own_format=frozenset(own_format),
        plain=plain,
        defended=mean,
    )
    if attacks is None:
        return found
    # What an attacker's batch has more tokens than a defender's, as which the ledger counts it.
    more = Work(tokens=math.prod(attack_batch) - math.prod(batch))
    if is_first_order(attacks):
        num_steps = attacks.attacker.num_steps
        drawn = [attacks.attacker.draw(0, number).data for number in range(num_attacks)]
        evaluations = (
            sum(data.evaluations_per_step(attack_batch[0]) for data in drawn) / num_attacks
        )
        flops = tracker.flops[ATTACK] / (num_steps * num_attacks)
        step = Work(evaluations, evaluations * math.prod(batch), flops)
        step_there = step.plus(more, evaluations)
        return replace(found, defended=mean.plus(step, -num_steps), attack_step=step_there)
    # All but the outer loss and L_safe at theta; batches between estimates take one at theta + v, too.
    estimated = mean.plus(more, mean.gradient_evaluations - 2)
    return replace(found, defended=plain.plus(plain), estimated=estimated)


def _compiled() -> list[Callable[..., Any]]:
    """Steps of optimizers that are compiled, if there are any by now."""
    module = sys.modules.get("torchao.optim.adam")
    return [] if module is None else [module.single_param_adam]


class _Ledger(Callback):
    """Notes what the gradients of every batch have cost, attacks included."""

    def __init__(self, tracker: Tracker, tokens_per_batch: int) -> None:
        self.batches: list[Work] = []
        self._tracker = tracker
        self._tokens_per_batch = tokens_per_batch

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Builds the model, and names its parameters and buffers, and gradients as they come."""
        pl_module.configure_model()
        model: nn.Module = pl_module.model
        self._tracker.label([*model.parameters(), *model.buffers()], Part.PARAMETERS)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._label_gradient)
                parameter.register_post_accumulate_grad_hook(
                    lambda owner: self._label_gradient(owner.grad)  # type: ignore[arg-type]
                )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._before = self._spent(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Leaves out what comes after the step, such as measuring how far it can be trusted."""
        self.batches.append(self._spent(pl_module).plus(self._before, -1))

    def _spent(self, defense: Defense) -> Work:
        count = defense.cost.gradient_evaluations
        return Work(count, count * self._tokens_per_batch, self._tracker.flops.total())

    def _label_gradient(self, gradient: Tensor) -> None:
        self._tracker.label([gradient], Part.GRADIENTS)


class _FullBatches(LightningDataModule):
    """Batches in which every conversation has the full length, as far as defenses ask for any."""

    has_attack = True

    def __init__(self, batch: Shape, attack_batch: Shape) -> None:
        super().__init__()
        self._batch, self._attack_batch = batch, attack_batch
        self.batch_sizes = batch[0], attack_batch[0]

    def train_dataloader(self) -> "_Stream":
        return _Stream(self._batch)

    def val_dataloader(self) -> list[Any]:
        return []

    def with_safe(self, safe: Any) -> "_FullBatches":
        """As that of `SafetyDataModule`."""
        return self

    def attack_stream(self) -> "_Stream":
        """As that of `SafetyDataModule`."""
        return _Stream(self._attack_batch)

    def attack_stream_of(self, variant: AttackData) -> "_Stream":
        """As that of `SafetyDataModule`."""
        num_rows, length = self._attack_batch
        return _Stream((variant.batch_size or num_rows, length))


class _Stream:
    position = 0

    def __init__(self, shape: Shape) -> None:
        self._shape = shape

    def load_state_dict(self, state: Any) -> None:
        """Every batch is like the others."""

    def __iter__(self) -> Iterator[Batch]:
        while True:
            ones = torch.ones(self._shape, dtype=torch.long)
            yield Batch(input_ids=ones, attention_mask=ones.clone(), labels=ones.clone())

    endless = __iter__


class _InPlace(SingleDeviceStrategy):
    """Leaves the model where it is: fake tensors cannot be swapped for others."""

    def model_to_device(self) -> None:
        pass

    def teardown(self) -> None:
        pass

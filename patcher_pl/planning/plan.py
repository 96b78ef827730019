"""Plans a run: what it needs as configured, what else could be done, and a verdict."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from patcher_pl.defenses import Defense
from patcher_pl.errors import ConfigError
from patcher_pl.hypergradients import Unrolled
from patcher_pl.models import LanguageModel, Sharding
from patcher_pl.models.context import context_length, with_layers
from patcher_pl.optim.master_weights import without_copies
from patcher_pl.planning.architecture import UnloadedModel, find_architecture
from patcher_pl.planning.attacks import attacks_of, is_first_order, toy_estimate, with_short_attacks
from patcher_pl.planning.hardware import Gpu, find_gpu
from patcher_pl.planning.placements import (
    Need,
    Overhead,
    Placement,
    can_shard,
    candidates,
    placement_of,
    settings_for,
    settings_to_shard,
    sharding_for,
)
from patcher_pl.planning.rehearsal import Footprint, LayerSizes, Work, rehearse
from patcher_pl.planning.tracker import HYPERGRADIENT, Part
from patcher_pl.validation import require

# Attack steps of a rehearsal: the second one begins with the attacker's optimizer state.
_ATTACK_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What a plan assumes.

    Args:
        gpu: GPU to fit, by its name in `patcher_pl.planning.hardware`.
        device_counts: Numbers of devices to look at.
        mfu: Share of the GPU's peak that training reaches (in (0, 1]).
        host_gib_per_device: Host memory that may be used for every device (GiB, >= 0).
        length: Tokens of every conversation, as far as the model reads them; null for
            `chat.max_length`, the most there can be.
        overhead: What the framework and the allocator take.
        model_config: The model's config.json; null looks in the model's directory, beside the
            configuration and on the hub.
        json: File to write the plan to.

    Raises:
        ValueError: If a value is out of its range.
    """

    gpu: str = "H100-80GB"
    device_counts: list[int] = field(default_factory=lambda: [1, 2, 8, 16, 64])
    mfu: float = 0.4
    host_gib_per_device: float = 200.0
    length: int | None = None
    overhead: Overhead = field(default_factory=Overhead)
    model_config: Path | None = None
    json: Path | None = None

    def __post_init__(self) -> None:
        require(self, 0 < self.mfu <= 1, "mfu", "in (0, 1]", "Good kernels reach 0.3 to 0.5.")
        holds, remedy = (
            self.host_gib_per_device >= 0,
            "Use 0 where nothing may wait in host memory.",
        )
        require(self, holds, "host_gib_per_device", ">= 0", remedy)
        holds = self.length is None or self.length >= 2
        require(self, holds, "length", ">= 2 or null", "Use null for chat.max_length.")
        holds = bool(self.device_counts) and min(self.device_counts) >= 1
        require(self, holds, "device_counts", "counts >= 1", "Use [1] for one device.")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A `fit` that is not to be started."""

    defense: Defense
    trainer: Any  # Options of Lightning's Trainer, its strategy by name or built.
    batch_size: int  # Conversations of a defender's batch (count).
    attack_batch_size: int  # Conversations of an attacker's batch (count).
    folders: Sequence[Path] = ()  # Of its configuration files.
    has_control: bool = False
    has_red_team: bool = False
    max_gradient_evaluations: int | None = None  # Ends it, where `trainer.max_steps` does not.


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What planning found out about one configuration and one GPU."""

    model: str  # Hub id or directory.
    defense: str
    num_parameters: int
    shapes: str  # Sizes of the batches, in words.
    gpu: Gpu  # What is to be fitted.
    configured: Need
    alternatives: Sequence[Need]  # Of other placements, those that cost least first.
    work: Work  # Of one device.
    dtype: str  # Number format of matrix products.
    mfu: float  # Share of the GPU's peak that is assumed to be reached.
    host_gib_per_device: float
    notes: Sequence[str] = ()  # What the figures do not say.
    sharding_settings: Sequence[str] = ()  # What else to set where a run begins to shard.

    def fits(self, need: Need) -> bool:
        """Whether the memory of devices and hosts is enough."""
        host_bytes = self.host_gib_per_device * 2**30 * need.placement.num_devices
        return need.device_bytes <= self.gpu.memory_bytes and need.host_bytes <= host_bytes

    @property
    def hours(self) -> float:
        """Time of the run; devices work side by side on batches of their own."""
        return self.work.flops / (self.gpu.peak_flops(self.dtype) * self.mfu) / 3600

    @property
    def refusal(self) -> str | None:
        """Why the run cannot be started as configured and what could; None where it can."""
        need, gib, gpu = self.configured, 2**30, self.gpu
        if self.fits(need):
            return None
        short = need.device_bytes - gpu.memory_bytes
        reason = (
            f"the {need.peak_phase} phase needs {need.device_bytes / gib:.1f} GiB per device, "
            f"{gpu.name} has {gpu.memory_gib:g} GiB, so {short / gib:.1f} GiB are missing."
            if short > 0
            else f"{need.host_bytes / gib:.1f} GiB of host memory are needed, "
            f"{self.host_gib_per_device:g} GiB per device (--host_gib_per_device) are there."
        )
        start = f"{self.model} does not fit as configured ({need.placement})"
        return f"{start}: {reason} {self._remedy(need.placement)}"

    def _remedy(self, now: Placement) -> str:
        fitting = next((need.placement for need in self.alternatives if self.fits(need)), None)
        if fitting is None:
            return (
                "None of the placements looked at fits either. Look at more devices "
                "(--device_counts), shorter conversations (chat.max_length), a smaller "
                "data.batch_size, or a larger GPU (--gpu)."
            )
        steps = settings_for(fitting, now)
        if fitting.sharded and not now.sharded:
            steps += self.sharding_settings
        return f"What fits with the fewest devices: {fitting}. Set {', '.join(steps)}."

    def as_dict(self) -> dict[str, Any]:
        """Returns the plan for JSON; memory in bytes."""
        return {
            **{
                name: getattr(self, name)
                for name in ("model", "defense", "num_parameters", "shapes")
            },
            "gpu": {"name": self.gpu.name, "memory_bytes": self.gpu.memory_bytes},
            "host_gib_per_device": self.host_gib_per_device,
            "configured": self._need_as_dict(self.configured),
            "alternatives": [self._need_as_dict(need) for need in self.alternatives],
            "work_per_device": vars(self.work),
            "time": {"hours": self.hours, "dtype": self.dtype, "mfu": self.mfu},
            "notes": list(self.notes),
        }

    def _need_as_dict(self, need: Need) -> dict[str, Any]:
        fields = ("num_devices", "sharded", "checkpointing")
        return {
            "placement": str(need.placement),
            **{name: getattr(need.placement, name) for name in fields},
            "on_host": sorted(need.placement.on_host),
            "fits": self.fits(need),
            **{name: getattr(need, name) for name in ("peak_phase", "device_bytes", "host_bytes")},
            "device_bytes_by_phase": need.device,
        }


def make_plan(run: Run, settings: PlanSettings) -> Plan:
    """Rehearses the run, with activation checkpointing and as configured, and adds it up.

    Raises:
        ConfigError: If `fit` would refuse the configuration, or its attackers run beside it.
    """
    defense, trainer, gpu = run.defense, run.trainer, find_gpu(settings.gpu)
    attacks, model = attacks_of(defense), defense.language_model
    budget = run.max_gradient_evaluations
    if trainer.max_steps < 1 and budget is None:
        raise ConfigError(
            f"trainer.max_steps must be >= 1 to plan a run, got {trainer.max_steps}. Set it, or "
            "max_gradient_evaluations."
        )
    architecture = find_architecture(model, settings.model_config, run.folders)
    length = _length(model, architecture, settings)
    configured = placement_of(trainer, defense)
    sharding = sharding_for(trainer, model)

    @cache
    def rehearsed(checkpointing: bool, split: Sharding | None) -> Footprint:
        return _footprint(run, architecture, length, checkpointing, split)

    def footprint_of(placement: Placement) -> Footprint:
        # A rehearsal takes seconds: placements that compute in the same number formats share one.
        splits = placement.sharded and (sharding.param_dtype or sharding.reduce_dtype)
        return rehearsed(placement.checkpointing, sharding if splits else None)

    others = dict.fromkeys(
        replace(placement, on_host=placement.on_host | configured.on_host)
        for placement in candidates(
            settings.device_counts,
            can_shard=can_shard(defense, sharding),
            shards_one=configured.sharded,
        )
        if placement.checkpointing or not configured.checkpointing
    )
    needs = [p.need(footprint_of(p), settings.overhead) for p in (configured, *others)]
    found = footprint_of(configured)
    accumulated, num_steps = defense.accumulate_grad_batches, trainer.max_steps
    if budget is not None:
        within = found.steps_within(budget, accumulated, attacks)
        num_steps = within if num_steps < 1 else min(num_steps, within)
    return Plan(
        model=model.path,
        defense=type(defense).__name__,
        num_parameters=found.layers.num_parameters,
        shapes=f"{run.batch_size} x {length} tokens a batch"
        + (f", {run.attack_batch_size} in attacks" if attacks else ""),
        gpu=gpu,
        configured=needs[0],
        alternatives=needs[1:],
        work=found.of_run(num_steps, accumulated, attacks),
        dtype=_compute_dtype(run, configured.sharded),
        mfu=settings.mfu,
        host_gib_per_device=settings.host_gib_per_device,
        notes=_notes(run),
        sharding_settings=settings_to_shard(trainer, model),
    )


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a run holds in memory, where that is all that is asked.

    Args:
        num_parameters: Weights (count).
        weight_bytes: Of all of them.
        optimizer_bytes: State of the optimizers, `defender` and `attacker`; none where there was no rehearsal.
        peak: Peak by phase and part; None where there was no rehearsal.
        length: Tokens of every conversation that was rehearsed.
    """

    num_parameters: int
    weight_bytes: int
    optimizer_bytes: Mapping[str, int] = field(default_factory=dict)
    peak: Need | None = None
    length: int


def size_up(run: Run, settings: PlanSettings, min_parameters: int = 0) -> Sizes:
    """Tells what a run on one device holds in memory, in seconds whatever the size of the model.

    Models are rehearsed with their first layer, and with their first two; what the second one brings, the
    others are taken to bring too.

    Args:
        run: Its defense is used up by the rehearsal.
        settings: What is assumed.
        min_parameters: Weights below which nothing is rehearsed (count).

    Raises:
        ConfigError: If the run is sharded, or `fit` would refuse the configuration.
    """
    model = run.defense.language_model
    architecture = find_architecture(model, settings.model_config, run.folders)
    length = _length(model, architecture, settings)
    with torch.device("meta"):
        plain = {**vars(model), "lora": None, "compile": False, "liger": False}
        whole = LayerSizes.of(UnloadedModel(**plain, architecture=architecture).load_model())
    sizes = Sizes(num_parameters=whole.num_parameters, weight_bytes=whole.total, length=length)
    if whole.num_parameters < min_parameters:
        return sizes
    placement = placement_of(run.trainer, run.defense)
    if placement.sharded:
        raise ConfigError("a sharded run takes a whole rehearsal: `plan` makes it.")
    first, second = (
        _footprint(run, with_layers(architecture, n), length, placement.checkpointing, None)
        for n in (1, 2)
    )
    num_more = architecture.get_text_config().num_hidden_layers - 1
    whole_run = replace(first, peaks=first.peaks_with_layers(second, num_more))
    peak = placement.need(whole_run, settings.overhead)
    optimizers = {"defender": Part.DEFENDER_OPTIMIZER, "attacker": Part.ATTACKER_OPTIMIZER}
    optimizer_bytes = {
        side: max(parts.get(part, 0) for parts in peak.device.values())
        for side, part in optimizers.items()
    }
    return replace(sizes, peak=peak, optimizer_bytes=optimizer_bytes)


def _length(model: LanguageModel, architecture: Any, settings: PlanSettings) -> int:
    wanted = settings.length or model.chat.max_length
    return min(wanted, context_length(architecture) or wanted)


def _footprint(
    run: Run, architecture: Any, length: int, checkpointing: bool, sharding: Sharding | None
) -> Footprint:
    """Rehearses in the number formats that `sharding` computes in; None for those of the Trainer."""
    model, attacks = run.defense.language_model, attacks_of(run.defense)
    computed = (sharding.param_dtype if sharding else None) or model.dtype
    changes = {"dtype": computed, "gradient_checkpointing": checkpointing}
    # Neither kernel runs on fake tensors; both need less than the plain operations that stand in.
    settings = {**vars(model), **changes, "compile": False, "liger": False}

    def rehearsed(num_attack_steps: int) -> Footprint:
        defense = with_short_attacks(run.defense, num_attack_steps)
        defense.language_model = UnloadedModel(**settings, architecture=architecture)
        # Sharded weights are rehearsed in the format that they are gathered in.
        with without_copies() if sharding else nullcontext():
            return rehearse(
                *(defense, (run.batch_size, length), (run.attack_batch_size, length)),
                precision="32-true" if sharding else run.trainer.precision,
                multi_tensor=run.trainer.accelerator != "cpu",
            )

    num_steps = 0 if attacks is None else attacks.attacker.num_steps
    found = rehearsed(min(_ATTACK_STEPS, num_steps))
    if attacks is not None and not is_first_order(attacks) and num_steps > _ATTACK_STEPS:
        if isinstance(attacks.hypergradient, Unrolled):
            # A graph through the whole attack grows by the same amount with every step.
            one, times = rehearsed(_ATTACK_STEPS - 1), num_steps - _ATTACK_STEPS
            more_bytes = times * (found.peak(HYPERGRADIENT) - one.peak(HYPERGRADIENT))
            more = Work().plus(found.estimated, times).plus(one.estimated, -times)
        else:
            # Trajectory stores grow in steps (sqrt(K), say), so two points of a line would not do;
            # what they keep is counted in copies of the weights, whatever the model.
            short, long = (toy_estimate(attacks, steps) for steps in (_ATTACK_STEPS, num_steps))
            more_bytes = round((long[0] - short[0]) * found.layers.total)
            of_attack = run.attack_batch_size / run.batch_size
            more = Work(1, found.plain.tokens * of_attack, found.plain.flops * of_attack)
            more = Work().plus(more, long[1] - short[1])
        found = found.with_longer_estimates(more_bytes, more)
    if sharding is None:
        return found
    formats = {
        "stored": model.dtype,
        "computed": computed,
        "sent": sharding.reduce_dtype or computed,
    }
    sizes = {name: getattr(torch, dtype).itemsize for name, dtype in formats.items()}
    return found.with_stored_weights(**sizes)


def _compute_dtype(run: Run, sharded: bool) -> str:
    model = run.defense.language_model
    if sharded and model.sharding.param_dtype is not None:
        return model.sharding.param_dtype
    return "bfloat16" if str(run.trainer.precision).startswith("bf16") else model.dtype


def _notes(run: Run) -> list[str]:
    notes = ["every conversation is taken to have the full length: an upper bound."]
    if run.has_control:
        notes.append("the SFT control of `control: true` takes as many gradient evaluations again.")
    if run.has_red_team:
        notes.append(
            "the red team's attacks are not included; they keep the weights in host memory, too."
        )
    return notes

"""Plans a run: what it needs as configured, what else could be done, and a verdict."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from patcher_pl.defenses import Defense
from patcher_pl.errors import ConfigError
from patcher_pl.hypergradients import Unrolled
from patcher_pl.models import Sharding
from patcher_pl.planning.architecture import UnloadedModel, find_architecture
from patcher_pl.planning.attacks import Attacks, toy_estimate, with_short_attacks
from patcher_pl.planning.footprint import Footprint, Work
from patcher_pl.planning.hardware import Gpu, find_gpu
from patcher_pl.planning.placements import Need, Overhead, Placement, candidates, settings_for
from patcher_pl.planning.placing import can_shard, placement_of, settings_to_shard, sharding_for
from patcher_pl.planning.rehearsal import Shapes, rehearse
from patcher_pl.planning.tracker import HYPERGRADIENT

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
        length: Tokens of every conversation; null for `chat.max_length`, the most there can be.
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
        counts, host_gib = self.device_counts, self.host_gib_per_device
        for name, holds, rule, remedy in (
            ("mfu", 0 < self.mfu <= 1, "be in (0, 1]", "Good kernels reach 0.3 to 0.5."),
            (
                *("host_gib_per_device", host_gib >= 0, "be >= 0"),
                "Use 0 where nothing may wait in host memory.",
            ),
            (
                *("length", self.length is None or self.length >= 2, "be >= 2 or null"),
                "Use null for chat.max_length.",
            ),
            (
                *("device_counts", counts and min(counts) >= 1, "hold counts >= 1"),
                "Use [1] for one device.",
            ),
        ):
            if not holds:
                value = getattr(self, name)
                raise ValueError(f"PlanSettings.{name} must {rule}, got {value}. {remedy}")


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
        need = self.configured
        if self.fits(need):
            return None
        start = f"{self.model} does not fit as configured ({need.placement}):"
        short = need.device_bytes - self.gpu.memory_bytes
        if short <= 0:
            return (
                f"{start} {need.host_bytes / 2**30:.1f} GiB of host memory are needed, "
                f"{self.host_gib_per_device:g} GiB per device (--host_gib_per_device) are there. "
                f"{self._remedy()}"
            )
        return (
            f"{start} the {need.peak_phase} phase needs {need.device_bytes / 2**30:.1f} GiB per "
            f"device, {self.gpu.name} has {self.gpu.memory_gib:g} GiB, so {short / 2**30:.1f} GiB are "
            f"missing. {self._remedy()}"
        )

    def _remedy(self) -> str:
        now = self.configured.placement
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
            "model": self.model,
            "defense": self.defense,
            "num_parameters": self.num_parameters,
            "shapes": self.shapes,
            "gpu": {"name": self.gpu.name, "memory_bytes": self.gpu.memory_bytes},
            "host_gib_per_device": self.host_gib_per_device,
            "configured": self._need_as_dict(self.configured),
            "alternatives": [self._need_as_dict(need) for need in self.alternatives],
            "work_per_device": vars(self.work),
            "time": {"hours": self.hours, "dtype": self.dtype, "mfu": self.mfu},
            "notes": list(self.notes),
        }

    def _need_as_dict(self, need: Need) -> dict[str, Any]:
        return {
            "placement": str(need.placement),
            "num_devices": need.placement.num_devices,
            "sharded": need.placement.sharded,
            "checkpointing": need.placement.checkpointing,
            "on_host": sorted(need.placement.on_host),
            "fits": self.fits(need),
            "peak_phase": need.peak_phase,
            "device_bytes": need.device_bytes,
            "host_bytes": need.host_bytes,
            "device_bytes_by_phase": need.device,
        }


def make_plan(run: Run, settings: PlanSettings) -> Plan:
    """Rehearses the run, with activation checkpointing and as configured, and adds it up.

    Raises:
        ConfigError: If `fit` would refuse the configuration, or its attackers run beside it.
    """
    defense, trainer, gpu = run.defense, run.trainer, find_gpu(settings.gpu)
    attacks, model = Attacks.of(defense), defense.language_model
    if trainer.max_steps < 1:
        raise ConfigError(
            f"trainer.max_steps must be >= 1 to plan a run, got {trainer.max_steps}. Set it."
        )
    shapes = Shapes(run.batch_size, run.attack_batch_size, settings.length or model.chat.max_length)
    configured = placement_of(trainer, defense)
    sharding = sharding_for(trainer, model)
    architecture = find_architecture(model, settings.model_config, run.folders)

    @cache
    def rehearsed(checkpointing: bool, split: Sharding | None) -> Footprint:
        return _footprint(run, architecture, shapes, checkpointing, split)

    def footprint_of(placement: Placement) -> Footprint:
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
    return Plan(
        model=model.path,
        defense=type(defense).__name__,
        num_parameters=found.layers.num_parameters,
        shapes=f"{shapes.batch_size} x {shapes.length} tokens a batch"
        + (f", {shapes.attack_batch_size} in attacks" if attacks else ""),
        gpu=gpu,
        configured=needs[0],
        alternatives=needs[1:],
        work=found.of_run(trainer.max_steps, defense.accumulate_grad_batches, attacks).rounded(),
        dtype=_compute_dtype(run, configured.sharded),
        mfu=settings.mfu,
        host_gib_per_device=settings.host_gib_per_device,
        notes=_notes(run),
        sharding_settings=settings_to_shard(trainer, model),
    )


def _footprint(
    run: Run, architecture: Any, shapes: Shapes, checkpointing: bool, sharding: Sharding | None
) -> Footprint:
    """Rehearses in the number formats that `sharding` computes in; None for those of the Trainer."""
    stored = run.defense.language_model.dtype
    computed = stored if sharding is None else sharding.param_dtype or stored

    def rehearsed(num_attack_steps: int) -> Footprint:
        defense = with_short_attacks(run.defense, num_attack_steps)
        defense.language_model = UnloadedModel.of(
            *(defense.language_model, architecture),
            dtype=computed,
            gradient_checkpointing=checkpointing,
        )
        return rehearse(
            *(defense, shapes),
            precision=run.trainer.precision if sharding is None else "32-true",
            multi_tensor=run.trainer.accelerator != "cpu",
        )

    found = rehearsed(_ATTACK_STEPS)
    attacks = Attacks.of(run.defense)
    more_steps = 0 if attacks is None else attacks.attacker.num_steps - _ATTACK_STEPS
    if attacks is not None and not attacks.is_first_order and more_steps > 0:
        if isinstance(attacks.hypergradient, Unrolled):
            # A graph through the whole attack grows by the same amount with every step.
            one = rehearsed(_ATTACK_STEPS - 1)
            more_bytes = more_steps * (found.peak(HYPERGRADIENT) - one.peak(HYPERGRADIENT))
            more = Work().plus(found.estimated.plus(one.estimated, -1), more_steps)
        else:
            short, long = (toy_estimate(attacks, n) for n in (2, 2 + more_steps))
            more_bytes = round((long[0] - short[0]) * found.layers.total)
            batches = shapes.attack_batch_size / shapes.batch_size
            evaluation = Work(1, found.plain.tokens * batches, found.plain.flops * batches)
            more = Work().plus(evaluation, long[1] - short[1])
        found = found.with_longer_estimates(more_bytes, more)
    if sharding is None:
        return found
    sent = sharding.reduce_dtype or computed
    return found.with_stored_weights(
        stored=_itemsize(stored), computed=_itemsize(computed), sent=_itemsize(sent)
    )


def _itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


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
        notes.append("the red team's attacks are not included; they need memory for two models.")
    return notes

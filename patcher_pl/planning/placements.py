"""Where a run keeps its weights, where else it could, and what each way needs of a device."""

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace
from typing import Any

from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)

from patcher_pl.defenses import Defense
from patcher_pl.defenses.strategies import require_shardable, require_supported
from patcher_pl.errors import ConfigError
from patcher_pl.models import LanguageModel, Sharding
from patcher_pl.planning.attacks import attacks_of
from patcher_pl.planning.rehearsal import Footprint, LayerSizes
from patcher_pl.planning.tracker import PER_WEIGHT, Part, Parts

OFFLOADED = PER_WEIGHT  # What CPU offload keeps in host memory.
VECTORS = frozenset({Part.ATTACK_VECTOR, Part.SAVED_WEIGHTS})
# Lightning's short names of precisions, as `str` shows them.
_PRECISIONS = {
    **{"None": "32-true", "32": "32-true", "64": "64-true"},
    **{"16": "16-mixed", "bf16": "bf16-mixed"},
}


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """What comes on top of tensors, by assumption.

    Args:
        fixed_gib: Context of the driver, libraries and their workspaces (GiB, >= 0).
        fragmentation: What the allocator loses, by what tensors need (>= 0).

    Raises:
        ValueError: If a value is out of its range.
    """

    fixed_gib: float = 1.5
    fragmentation: float = 0.05

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(f"Overhead.{name} must be >= 0, got {value}. Use 0 for none.")

    def of(self, tensor_bytes: int) -> int:
        """Returns the overhead on so many bytes of tensors."""
        return round(self.fixed_gib * 2**30 + self.fragmentation * tensor_bytes)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a run keeps what."""

    num_devices: int = 1  # On all nodes together (count); each has batches of its own.
    sharded: bool = (
        False  # Whether FSDP2 splits weights, and all of their shape, among the devices.
    )
    num_replicas: int = 1  # Copies of the model (count).
    keeps_gathered: bool = False  # Whether gathered layers stay until the backward pass.
    checkpointing: bool = False  # Whether activations are recomputed in the backward pass.
    on_host: frozenset[Part] = frozenset()  # What waits in host memory.

    def __str__(self) -> str:
        words = [f"{self.num_devices} device{'s' if self.num_devices > 1 else ''}"]
        words += ["FSDP2"] if self.sharded else []
        words += [f"{self.num_replicas} copies"] if self.num_replicas > 1 else []
        words += ["activation checkpointing"] if self.checkpointing else []
        if self.on_host >= OFFLOADED:
            words.append("CPU offload")
        elif self.on_host >= VECTORS:
            words.append("attack vector and saved theta on the host")
        return ", ".join(words)

    def need(self, footprint: Footprint, overhead: Overhead) -> "Need":
        """Returns what a device and the host must hold in every phase."""
        device, host = {}, {}
        for phase, moments in footprint.peaks.items():
            split = [self._split(parts, footprint.layers, overhead) for parts in moments]
            device[phase], host[phase] = (
                max(side, key=lambda parts: sum(parts.values()))
                for side in zip(*split, strict=True)
            )
        return Need(placement=self, device=device, host=host)

    def _split(self, parts: Parts, layers: LayerSizes, overhead: Overhead) -> tuple[Parts, Parts]:
        """Returns what of a moment lies on one device, and what on the hosts of all."""
        members = self.num_devices // self.num_replicas
        own = {
            part: math.ceil(n / members) if self.sharded and part in PER_WEIGHT else n
            for part, n in parts.items()
        }
        device = {part: n for part, n in own.items() if part not in self.on_host}
        host = {part: n * self.num_devices for part, n in own.items() if part in self.on_host}
        if self.sharded:
            device[Part.GATHERED] = gathered_bytes(layers, keep_all=self.keeps_gathered)
        device[Part.FRAMEWORK] = overhead.of(sum(device.values()))
        return device, host


@dataclass(frozen=True, kw_only=True)
class Need:
    """Memory that a placement needs, in bytes of every part by phase."""

    placement: Placement
    device: Mapping[str, Parts]  # On one device.
    host: Mapping[str, Parts]  # In host memory, on all nodes together.

    @property
    def peak_phase(self) -> str:
        """The phase that needs most on a device."""
        return max(self.device, key=lambda phase: sum(self.device[phase].values()))

    @property
    def device_bytes(self) -> int:
        """Peak on one device."""
        return sum(self.device[self.peak_phase].values())

    @property
    def host_bytes(self) -> int:
        """Peak in host memory."""
        return max(sum(parts.values()) for parts in self.host.values())


def candidates(
    counts: Sequence[int], *, can_shard: bool, shards_one: bool = False
) -> Iterator[Placement]:
    """Yields the placements to look at, those that cost least first.

    Args:
        counts: Numbers of devices.
        can_shard: Whether the run's gradient can be computed on split weights.
        shards_one: Whether FSDP2 is used on one device, too, as a run does that is set up for it.
    """
    for count in sorted(set(counts)):
        if count > 1 and not can_shard:
            continue
        split = {"num_devices": count, "sharded": count > 1 or shards_one}
        for on_host, checkpointing in product((frozenset(), VECTORS), (False, True)):
            yield Placement(**split, checkpointing=checkpointing, on_host=on_host)
        if can_shard:
            yield Placement(num_devices=count, sharded=True, checkpointing=True, on_host=OFFLOADED)


def gathered_bytes(layers: LayerSizes, *, keep_all: bool) -> int:
    """Whole weights and gradients that FSDP2 holds on a device at a time, at most.

    Outside of the decoder layers: weights from the beginning of a step to its end, gradients towards
    its end, when they are sent in place of the weights. Layers: the weights of the one at work and of
    the next, or of all (`keep_all`), the gradients of one and what is being sent of another.
    """
    sent = layers.sent_per_gathered
    weights = layers.total if keep_all else layers.rest + 2 * layers.largest_layer
    return weights + math.ceil(max(1, sent) * layers.rest + (1 + sent) * layers.largest_layer)


def settings_for(wanted: Placement, now: Placement) -> list[str]:
    """Returns what to set in a configuration, in words, to come from one placement to another."""
    count, model = wanted.num_devices, "model.init_args.language_model"
    moved, more_devices = wanted.on_host - now.on_host, count != now.num_devices
    offloads = Part.PARAMETERS in moved
    steps = {
        f"`{model}.gradient_checkpointing: true`": wanted.checkpointing > now.checkpointing,
        f"`trainer.devices` times `trainer.num_nodes` to {count}": more_devices,
        "`trainer.strategy` to lightning.pytorch.strategies.ModelParallelStrategy with "
        f"`data_parallel_size: {count}` and `tensor_parallel_size: 1` "
        "(configs/strategies)": wanted.sharded and (more_devices or not now.sharded),
        f"`{model}.sharding.num_replicas: 1`": wanted.sharded
        and now.num_replicas > wanted.num_replicas,
        f"`{model}.sharding.cpu_offload: true`": offloads,
        f"`{model}.weight_copies_on: host`": Part.ATTACK_VECTOR in moved and not offloads,
        f"`{model}.sharding.reshard_after_forward: true`": wanted.sharded
        and now.keeps_gathered > wanted.keeps_gathered,
    }
    return [step for step, is_needed in steps.items() if is_needed]


def placement_of(trainer: Any, defense: Defense) -> Placement:
    """Returns where a Trainer of these options (strategy by name or built) would place a run.

    Raises:
        ConfigError: If `fit` would refuse the options, or the number of devices depends on the machine.
    """
    devices = len(trainer.devices) if isinstance(trainer.devices, list) else trainer.devices
    if not str(devices).isdigit():
        raise ConfigError(
            f"trainer.devices must be a number to plan for, got {devices!r}. "
            "Give it on the command line: --trainer.devices 8."
        )
    world_size = int(devices) * trainer.num_nodes
    strategy = _strategy(trainer.strategy, world_size)
    if isinstance(strategy, FSDPStrategy):
        raise ConfigError(
            "trainer.strategy: `plan` knows FSDP2, got FSDPStrategy (FSDP1), which needs about as much. "
            "Plan with a ModelParallelStrategy, as in configs/strategies."
        )
    described = {"strategy": strategy, "world_size": world_size, "precision": _precision(trainer)}
    require_supported(defense, SimpleNamespace(**described))  # type: ignore[arg-type]
    model, sharded = defense.language_model, isinstance(strategy, ModelParallelStrategy)
    attacks = attacks_of(defense)
    store = None if attacks is None else getattr(attacks.hypergradient, "store", None)
    on_host = frozenset({Part.TRAJECTORY} if store and store.device != "model" else ())
    if model.weight_copies_on == "host":
        on_host |= VECTORS
    if sharded and model.sharding.cpu_offload:
        on_host |= OFFLOADED
    return Placement(
        num_devices=world_size,
        sharded=sharded,
        num_replicas=model.sharding.num_replicas if sharded else world_size,
        keeps_gathered=sharded and not model.sharding.reshard_after_forward,
        checkpointing=model.gradient_checkpointing,
        on_host=on_host,
    )


def sharding_for(trainer: Any, language_model: LanguageModel) -> Sharding:
    """Returns in which number formats FSDP2 would compute what the run computes now."""
    given = language_model.sharding
    if given.param_dtype is None and _precision(trainer) == "bf16-mixed":
        return replace(given, param_dtype="bfloat16", reduce_dtype="float32")
    return given


def settings_to_shard(trainer: Any, language_model: LanguageModel) -> list[str]:
    """Returns what to set, in words, for `sharding_for` to hold."""
    wanted, prefix = (
        sharding_for(trainer, language_model),
        "model.init_args.language_model.sharding",
    )
    if wanted == language_model.sharding:
        return []
    return [
        "`trainer.precision: 32-true`",
        f"`{prefix}.param_dtype: {wanted.param_dtype}`",
        f"`{prefix}.reduce_dtype: {wanted.reduce_dtype}`",
    ]


def can_shard(defense: Defense, sharding: Sharding) -> bool:
    """Whether the defense could be trained on split weights."""
    defense = deepcopy(defense)
    defense.language_model = replace(defense.language_model, sharding=sharding)
    try:
        require_shardable(defense)
    except ConfigError:
        return False
    return True


def _strategy(given: Any, world_size: int) -> Any:
    if not isinstance(given, str):
        return given
    if given == "auto":
        return SingleDeviceStrategy(device="cpu") if world_size == 1 else DDPStrategy()
    if given not in StrategyRegistry:
        raise ConfigError(
            f"trainer.strategy: {given!r} is none of Lightning's strategies. Use `auto` for one "
            "device, or one of configs/strategies for several."
        )
    return StrategyRegistry.get(given)


def _precision(trainer: Any) -> str:
    """The Trainer's precision by its full name."""
    return _PRECISIONS.get(str(trainer.precision), str(trainer.precision))

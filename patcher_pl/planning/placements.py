"""Ways to place a run on devices, what each needs there, and which of them fit."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from patcher_pl.planning.footprint import Footprint, LayerSizes, Parts
from patcher_pl.planning.parts import PER_WEIGHT, Part

OFFLOADED = frozenset(
    {
        Part.PARAMETERS,
        Part.GRADIENTS,
        Part.DEFENDER_OPTIMIZER,
        Part.ATTACKER_OPTIMIZER,
        Part.WEIGHT_TEMPORARIES,
        Part.ATTACK_VECTOR,
        Part.SAVED_WEIGHTS,
        Part.TRAJECTORY,
    }
)
VECTORS = frozenset({Part.ATTACK_VECTOR, Part.SAVED_WEIGHTS})


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
        for name in ("fixed_gib", "fragmentation"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"Overhead.{name} must be >= 0, got {getattr(self, name)}. Use 0 for none."
                )

    def of(self, tensor_bytes: int) -> int:
        """Returns the overhead on so many bytes of tensors."""
        return round(self.fixed_gib * 2**30 + self.fragmentation * tensor_bytes)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a run keeps what.

    Args:
        num_devices: Devices, on all nodes together (count, >= 1). Each has batches of its own.
        sharded: Whether weights, and all that has their shape, are split among the devices (FSDP2);
            otherwise each device has them whole.
        checkpointing: Whether activations are recomputed in the backward pass.
        on_host: Parts that wait in host memory.
        keeps_gathered: Whether gathered layers stay until the backward pass.
    """

    num_devices: int = 1
    sharded: bool = False
    keeps_gathered: bool = False
    checkpointing: bool = False
    on_host: frozenset[Part] = frozenset()

    def __str__(self) -> str:
        words = [f"{self.num_devices} device{'s' if self.num_devices > 1 else ''}"]
        words += ["FSDP2"] if self.sharded else []
        words += ["activation checkpointing"] if self.checkpointing else []
        if self.on_host >= OFFLOADED:
            words.append("CPU offload")
        elif self.on_host >= VECTORS:
            words.append("attack vector and saved theta on the host")
        return ", ".join(words)

    def need(self, footprint: Footprint, overhead: Overhead) -> "Need":
        """Returns what a device and the host must hold in every phase."""
        phases: dict[str, tuple[Parts, Parts]] = {}
        for phase, moments in footprint.peaks.items():
            split = [self._split(parts, footprint.layers, overhead) for parts in moments]
            phases[phase] = tuple(max(side, key=_total) for side in zip(*split, strict=True))  # type: ignore[assignment]
        return Need(
            placement=self,
            device={phase: device for phase, (device, _) in phases.items()},
            host={phase: host for phase, (_, host) in phases.items()},
        )

    def _split(
        self, parts: Parts, layers: LayerSizes, overhead: Overhead
    ) -> tuple[dict[Part, int], dict[Part, int]]:
        """Returns what of a moment lies on one device, and what on the hosts of all."""
        own = {part: self._share(part, num_bytes) for part, num_bytes in parts.items()}
        device = {part: n for part, n in own.items() if part not in self.on_host}
        host = {part: n * self.num_devices for part, n in own.items() if part in self.on_host}
        if self.sharded:
            device[Part.GATHERED] = gathered_bytes(layers, keep_all=self.keeps_gathered)
        device[Part.FRAMEWORK] = overhead.of(sum(device.values()))
        return device, host

    def _share(self, part: Part, num_bytes: int) -> int:
        is_split = self.sharded and part in PER_WEIGHT
        return math.ceil(num_bytes / self.num_devices) if is_split else num_bytes


@dataclass(frozen=True, kw_only=True)
class Need:
    """Memory that a placement needs.

    Args:
        placement: Which.
        device: Bytes of every part on one device, by phase.
        host: Bytes of every part in host memory, on all nodes together, by phase.
    """

    placement: Placement
    device: Mapping[str, Parts]
    host: Mapping[str, Parts]

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


def _total(parts: Parts) -> int:
    return sum(parts.values())


def gathered_bytes(layers: LayerSizes, *, keep_all: bool) -> int:
    """Whole weights and gradients that FSDP2 holds on a device at a time, at most.

    Outside of the decoder layers: weights from the beginning of a step to its end, gradients towards
    its end, when they are sent in place of the weights. Layers: the weights of the one at work and of
    the next, or of all (`keep_all`), the gradients of one and what is being sent of another.
    """
    sent = layers.sent_per_gathered
    weights = layers.total if keep_all else layers.rest + 2 * layers.largest_layer
    return weights + math.ceil(max(1, sent) * layers.rest + (1 + sent) * layers.largest_layer)


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
        for on_host, checkpointing in product((frozenset(), VECTORS), (False, True)):
            yield Placement(
                num_devices=count,
                sharded=count > 1 or shards_one,
                checkpointing=checkpointing,
                on_host=on_host,
            )
        if can_shard:
            yield Placement(num_devices=count, sharded=True, checkpointing=True, on_host=OFFLOADED)

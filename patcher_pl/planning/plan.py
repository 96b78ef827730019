"""The outcome of planning: what a run needs as configured, what else could be done, and a verdict."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from patcher_pl.planning.hardware import Gpu
from patcher_pl.planning.parts import Part
from patcher_pl.planning.placements import Need, Placement
from patcher_pl.planning.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What planning found out about one configuration and one GPU.

    Args:
        model: Hub id or directory.
        defense: Name of the defense.
        num_parameters: Of the model (count).
        shapes: Sizes of the batches, in words.
        gpu: What is to be fitted.
        configured: Need of the run as it is configured.
        alternatives: Need of other placements, those that cost least first.
        work: Work of one device.
        dtype: Number format of matrix products.
        mfu: Share of the GPU's peak that is assumed to be reached.
        host_gib_per_device: Host memory that may be used for every device (GiB).
        notes: What the figures do not say.
        sharding_settings: What else to set where a run that does not shard is to begin to.
    """

    model: str
    defense: str
    num_parameters: int
    shapes: str
    gpu: Gpu
    configured: Need
    alternatives: Sequence[Need]
    work: Workload
    dtype: str
    mfu: float
    host_gib_per_device: float
    notes: Sequence[str] = ()
    sharding_settings: Sequence[str] = ()

    def fits(self, need: Need) -> bool:
        """Whether the memory of devices and hosts is enough."""
        host_bytes = self.host_gib_per_device * 2**30 * need.placement.num_devices
        return need.device_bytes <= self.gpu.memory_bytes and need.host_bytes <= host_bytes

    @property
    def hours(self) -> float:
        """Time of the run; devices work side by side on batches of their own."""
        return self.work.hours(self.gpu, self.dtype, self.mfu)

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
                f"{start} {_gib(need.host_bytes)} GiB of host memory are needed, "
                f"{self.host_gib_per_device:g} GiB per device (--host_gib_per_device) are there. "
                f"{self._remedy()}"
            )
        return (
            f"{start} the {need.peak_phase} phase needs {_gib(need.device_bytes)} GiB per device, "
            f"{self.gpu.name} has {self.gpu.memory_gib:g} GiB, so {_gib(short)} GiB are missing. "
            f"{self._remedy()}"
        )

    def _remedy(self) -> str:
        fitting = next((need for need in self.alternatives if self.fits(need)), None)
        if fitting is None:
            return (
                "None of the placements looked at fits either. Look at more devices "
                "(--device_counts), shorter conversations (chat.max_length), a smaller "
                "data.batch_size, or a larger GPU (--gpu)."
            )
        steps = settings_for(fitting.placement, self.configured.placement)
        if fitting.placement.sharded and not self.configured.placement.sharded:
            steps += self.sharding_settings
        return f"What fits with the fewest devices: {fitting.placement}. Set {', '.join(steps)}."

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
            "work_per_device": {
                "gradient_evaluations": self.work.gradient_evaluations,
                "tokens": self.work.tokens,
                "flops": self.work.flops,
            },
            "time": {"hours": self.hours, "dtype": self.dtype, "mfu": self.mfu},
            "notes": list(self.notes),
        }

    def _need_as_dict(self, need: Need) -> dict[str, Any]:
        placement = need.placement
        return {
            "placement": str(placement),
            "num_devices": placement.num_devices,
            "sharded": placement.sharded,
            "checkpointing": placement.checkpointing,
            "on_host": sorted(part.value for part in placement.on_host),
            "fits": self.fits(need),
            "peak_phase": need.peak_phase,
            "device_bytes": need.device_bytes,
            "host_bytes": need.host_bytes,
            "device_bytes_by_phase": {
                phase: {part.value: n for part, n in parts.items()}
                for phase, parts in need.device.items()
            },
        }


def settings_for(wanted: Placement, now: Placement) -> list[str]:
    """Returns what to set in a configuration, in words, to come from one placement to another."""
    steps, model = [], "model.init_args.language_model"
    if wanted.checkpointing and not now.checkpointing:
        steps.append(f"`{model}.gradient_checkpointing: true`")
    if wanted.num_devices != now.num_devices:
        steps.append(f"`trainer.devices` times `trainer.num_nodes` to {wanted.num_devices}")
    if wanted.sharded and (not now.sharded or wanted.num_devices != now.num_devices):
        steps.append(
            "`trainer.strategy` to lightning.pytorch.strategies.ModelParallelStrategy with "
            f"`data_parallel_size: {wanted.num_devices}` and `tensor_parallel_size: 1` "
            "(configs/strategies)"
        )
    if Part.PARAMETERS in wanted.on_host and Part.PARAMETERS not in now.on_host:
        steps.append(f"`{model}.sharding.cpu_offload: true`")
    elif Part.ATTACK_VECTOR in wanted.on_host and Part.ATTACK_VECTOR not in now.on_host:
        steps.append(f"`{model}.weight_copies_on: host`")
    if now.keeps_gathered and wanted.sharded and not wanted.keeps_gathered:
        steps.append(f"`{model}.sharding.reshard_after_forward: true`")
    return steps


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f}"

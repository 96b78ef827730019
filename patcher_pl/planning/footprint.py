"""What one process of a run needs, as a rehearsal found it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from patcher_pl.models.blocks import find_blocks
from patcher_pl.planning.parts import HYPERGRADIENT, PER_WEIGHT, Part

Parts = Mapping[Part, int]


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """How the parameters of a model fall into what FSDP2 gathers one at a time.

    Args:
        total: Bytes of all parameters.
        largest_layer: Bytes of the largest decoder layer.
        rest: Bytes outside of the decoder layers (embeddings, output head, last norm).
        num_parameters: Parameters (count).
        sent_per_gathered: Bytes of a gradient as it is sent, by those of the gathered weight.
    """

    total: int
    largest_layer: int
    rest: int
    num_parameters: int
    sent_per_gathered: float = 1.0

    @classmethod
    def of(cls, model: nn.Module) -> "LayerSizes":
        """Measures a model, real or fake."""
        layers = [_num_bytes(block) for block in find_blocks(model)]
        total = _num_bytes(model)
        return cls(
            total=total,
            largest_layer=max(layers, default=0),
            rest=total - sum(layers),
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        )


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Peaks and FLOPs of one process on one device.

    Args:
        peaks: For every phase, the bytes of every part at the moments of highest need; see
            `Tracker.peaks`.
        plain_flops: Of a defender's batch before the first attack.
        defended_flops: Of a defender's batch afterwards, without any attack or estimate.
        attack_step_flops: Of one attack step; 0 without attacks.
        estimate_flops: Of one estimate of a hypergradient, its attack included; 0 without any.
        plain_evaluations: Gradient evaluations of a batch before the first attack (count).
        defended_evaluations: The same afterwards, without any attack or estimate (count).
        estimate_evaluations: Of one estimate, attack and outer loss included (count).
        layers: Sizes of the model's layers.
    """

    peaks: Mapping[str, Sequence[Parts]]
    plain_flops: int
    defended_flops: int
    attack_step_flops: int
    estimate_flops: int
    plain_evaluations: int
    defended_evaluations: int
    estimate_evaluations: float
    layers: LayerSizes

    def with_longer_estimates(
        self, *, more_bytes: int, more_evaluations: float, more_flops: int
    ) -> "Footprint":
        """Returns the footprint with a longer attack to differentiate."""
        estimate = [
            {**parts, Part.TRAJECTORY: parts.get(Part.TRAJECTORY, 0) + more_bytes}
            for parts in self.peaks[HYPERGRADIENT]
        ]
        return replace(
            self,
            peaks={**self.peaks, HYPERGRADIENT: estimate},
            estimate_flops=self.estimate_flops + more_flops,
            estimate_evaluations=self.estimate_evaluations + more_evaluations,
        )

    def with_stored_weights(self, *, stored: int, computed: int, sent: int) -> "Footprint":
        """Returns the footprint of weights that FSDP2 keeps in another format than it computes in.

        Args:
            stored: Bytes of a number as it is kept, and of all that is calculated with it.
            computed: Bytes of a number of the rehearsal, in which layers are gathered.
            sent: Bytes of a number of a gradient on its way to other devices.
        """
        return replace(
            self,
            peaks={
                phase: [
                    {
                        part: n * stored // computed if part in PER_WEIGHT else n
                        for part, n in parts.items()
                    }
                    for parts in moments
                ]
                for phase, moments in self.peaks.items()
            },
            layers=replace(self.layers, sent_per_gathered=sent / computed),
        )


def _num_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())

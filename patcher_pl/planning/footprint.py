"""What one process of a run needs, as a rehearsal found it, and what that makes of a whole run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from patcher_pl.hypergradients.hvp.rematerialization import decoder_blocks
from patcher_pl.planning.attacks import Attacks
from patcher_pl.planning.tracker import HYPERGRADIENT, PER_WEIGHT, Part, Parts


@dataclass(frozen=True)
class Work:
    """Work of one device in training."""

    gradient_evaluations: float = 0  # Forward-backward passes over one batch (count).
    tokens: float = 0  # In them, padding to the full length included (count).
    flops: float = 0  # Of matrix products and attention.

    def plus(self, other: "Work", times: float = 1) -> "Work":
        """Returns the sum of this and so many times `other`."""
        return Work(
            self.gradient_evaluations + times * other.gradient_evaluations,
            self.tokens + times * other.tokens,
            self.flops + times * other.flops,
        )

    def rounded(self) -> "Work":
        """Returns whole numbers."""
        return Work(math.ceil(self.gradient_evaluations), round(self.tokens), round(self.flops))


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
            for module in (model, *decoder_blocks(model))
        )
        return cls(
            total=total,
            largest_layer=max(layers, default=0),
            rest=total - sum(layers),
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        )

    def gathered_bytes(self, *, keep_all: bool) -> int:
        """Whole weights and gradients that FSDP2 holds on a device at a time, at most.

        Outside of the decoder layers: weights from the beginning of a step to its end, gradients
        towards its end, when they are sent in place of the weights. Layers: the weights of the one at
        work and of the next, or of all (`keep_all`), the gradients of one and what is being sent of
        another.
        """
        sent = self.sent_per_gathered
        weights = self.total if keep_all else self.rest + 2 * self.largest_layer
        return weights + math.ceil(max(1, sent) * self.rest + (1 + sent) * self.largest_layer)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Peaks and work of one process on one device."""

    peaks: Mapping[str, Sequence[Parts]]  # Of every phase; see `Tracker.peaks`.
    layers: LayerSizes
    plain: Work  # Of a defender's batch before the first attack.
    defended: Work  # Of one afterwards, without any attack or estimate.
    attack_step: Work = Work()
    estimated: Work = Work()  # Of a batch whose gradient is a fresh hypergradient, all in all.

    def peak(self, phase: str) -> int:
        """Most bytes in a phase."""
        return max(sum(parts.values()) for parts in self.peaks[phase])

    def of_run(self, max_steps: int, accumulate_grad_batches: int, attacks: Attacks | None) -> Work:
        """Adds up the rounds of a run: plain steps, then attacks and defended steps."""
        if attacks is None:
            return Work().plus(self.plain, max_steps * accumulate_grad_batches)
        num_plain = min(max_steps, attacks.num_sft_steps)
        num_attacks = math.ceil((max_steps - num_plain) / attacks.refresh_every)
        # A fresh hypergradient brings its own attack, once per batch of its step.
        num_fresh = 0 if attacks.is_first_order else num_attacks
        num_defended = max_steps - num_plain - num_fresh
        found = Work().plus(self.plain, num_plain * accumulate_grad_batches)
        found = found.plus(self.defended, num_defended * accumulate_grad_batches)
        found = found.plus(self.estimated, num_fresh * accumulate_grad_batches)
        num_attack_steps = (num_attacks - num_fresh) * attacks.attacker.num_steps
        return found.plus(self.attack_step, num_attack_steps)

    def with_longer_estimates(self, more_bytes: int, more: Work) -> "Footprint":
        """Returns the footprint with a longer attack to differentiate."""
        estimate = [
            {**parts, Part.TRAJECTORY: parts.get(Part.TRAJECTORY, 0) + more_bytes}
            for parts in self.peaks[HYPERGRADIENT]
        ]
        peaks = {**self.peaks, HYPERGRADIENT: estimate}
        return replace(self, peaks=peaks, estimated=self.estimated.plus(more))

    def with_stored_weights(self, *, stored: int, computed: int, sent: int) -> "Footprint":
        """Returns the footprint of weights that FSDP2 keeps in another format than it computes in.

        Args:
            stored: Bytes of a number as it is kept, and of all that is calculated with it.
            computed: Bytes of a number of the rehearsal, in which layers are gathered.
            sent: Bytes of a number of a gradient on its way to other devices.
        """
        peaks = {
            phase: [
                {part: n * stored // computed if part in PER_WEIGHT else n for part, n in p.items()}
                for p in moments
            ]
            for phase, moments in self.peaks.items()
        }
        layers = replace(self.layers, sent_per_gathered=sent / computed)
        return replace(self, peaks=peaks, layers=layers)

"""Tokens, floating-point operations and time of a whole run."""

import math
from dataclasses import dataclass

from patcher_pl.errors import ConfigError
from patcher_pl.planning.footprint import Footprint
from patcher_pl.planning.hardware import Gpu


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How often a run does what.

    Args:
        num_plain_batches: Defender's batches before the first attack (count).
        num_defended_batches: Defender's batches afterwards, without those below (count).
        num_estimated_batches: Batches whose gradient is a fresh hypergradient (count).
        num_attack_steps: Steps of all attacks together, without those of hypergradients (count).
        attack_length: Steps of one attack (k1, count); 0 without attacks.
    """

    num_plain_batches: int
    num_defended_batches: int
    num_estimated_batches: int
    num_attack_steps: int
    attack_length: int

    @classmethod
    def of(
        cls,
        *,
        max_steps: int,
        accumulate_grad_batches: int,
        num_sft_steps: int,
        refresh_every: int,
        attack_length: int,
        is_first_order: bool,
    ) -> "Rounds":
        """Counts for Patcher; for a defense without attacks, `attack_length` is 0.

        Raises:
            ConfigError: If the run has no end.
        """
        if max_steps < 1:
            raise ConfigError(
                f"trainer.max_steps must be >= 1 to plan a run, got {max_steps}. Set it."
            )
        num_plain = min(max_steps, num_sft_steps) if attack_length else max_steps
        num_defended = max_steps - num_plain
        num_attacks = math.ceil(num_defended / refresh_every)
        num_fresh = 0 if is_first_order else num_attacks
        return cls(
            num_plain_batches=num_plain * accumulate_grad_batches,
            num_defended_batches=(num_defended - num_fresh) * accumulate_grad_batches,
            num_estimated_batches=num_fresh * accumulate_grad_batches,
            num_attack_steps=num_attacks * attack_length if is_first_order else 0,
            attack_length=attack_length,
        )


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Work of one device in a whole run, training only.

    Args:
        gradient_evaluations: Forward-backward passes over one batch (count).
        tokens: Tokens in them, padding to the full length included (count).
        flops: Floating-point operations of matrix products and attention.
    """

    gradient_evaluations: int
    tokens: int
    flops: int

    @classmethod
    def of(
        cls,
        footprint: Footprint,
        rounds: Rounds,
        *,
        tokens_per_batch: int,
        tokens_per_attack_batch: int,
    ) -> "Workload":
        """Adds up the rounds of a run.

        Args:
            footprint: FLOPs of every kind of batch.
            rounds: How many of each.
            tokens_per_batch: Tokens of a defender's batch (count).
            tokens_per_attack_batch: Tokens of an attacker's batch (count).
        """
        plain_flops = footprint.plain_flops
        estimated = rounds.num_estimated_batches
        on_safe = (
            rounds.num_plain_batches * footprint.plain_evaluations
            + rounds.num_defended_batches * footprint.defended_evaluations
            + 2 * estimated  # The outer loss of the estimate, and L_safe at theta.
        )
        on_unsafe = rounds.num_attack_steps + math.ceil(
            estimated * max(footprint.estimate_evaluations - 1, 0)
        )
        return cls(
            gradient_evaluations=on_safe + on_unsafe,
            tokens=on_safe * tokens_per_batch + on_unsafe * tokens_per_attack_batch,
            flops=rounds.num_plain_batches * plain_flops
            + rounds.num_defended_batches * footprint.defended_flops
            + rounds.num_attack_steps * footprint.attack_step_flops
            + estimated * (footprint.estimate_flops + plain_flops),
        )

    def hours(self, gpu: Gpu, dtype: str, mfu: float) -> float:
        """Returns the time at a share `mfu` of the GPU's peak (hours)."""
        return self.flops / (gpu.peak_flops(dtype) * mfu) / 3600

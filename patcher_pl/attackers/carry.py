"""Attacks that go on where the last one ended, instead of beginning at the defender's weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patcher_pl.randomness import derive_seed
from patcher_pl.validation import require


@dataclass(frozen=True, kw_only=True)
class Carry:
    """Lets each attack go on from where the last one of its kind ended.

        v_n = A_k1(theta_n + scale v_{n-1}) - theta_n,   v = 0 where an attack begins anew,

    with A_k1 the attack's k1 steps and theta_n the defender's weights when the n-th attack begins. What
    the defender is trained against after R such attacks has come R k1 steps, at the cost of k1 steps
    per attack. The defender has moved in between: it is not one attack of R k1 steps on one theta.

    Args:
        restart_every: Attacks after which one begins at theta again (count, >= 1); None leaves that to
            `restart_probability`.
        restart_probability: Chance with which an attack begins at theta (in [0, 1]), drawn by seed and
            number; None never does, but for the first attack and every `restart_every`-th.
        scale: Stretches the carried vector before an attack goes on from it (> 0). More than 1 begins
            beyond the points that the defender was trained at.
        keep_optimizer: Whether the attacker's optimizer keeps its moments too.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Carrying a perturbation of the inputs from step to step: Shafahi et al., 2019, Adversarial
        training for free, https://arxiv.org/abs/1904.12843. Here it is one of the weights.
    """

    restart_every: int | None = None
    restart_probability: float | None = None
    scale: float = 1.0
    keep_optimizer: bool = False

    def __post_init__(self) -> None:
        holds = self.restart_every is None or self.restart_every >= 1
        require(self, holds, "restart_every", ">= 1 or null", "Use 8 to begin anew now and then.")
        holds = self.restart_probability is None or 0 <= self.restart_probability <= 1
        require(self, holds, "restart_probability", "in [0, 1] or null", "Use null for none.")
        require(self, self.scale > 0, "scale", "> 0", "Use 1 to go on where the attack ended.")

    def begins_anew(self, seed: int, number: int) -> bool:
        """Whether the attack of this number (count from 0) begins at theta."""
        if number == 0 or (self.restart_every is not None and number % self.restart_every == 0):
            return True
        if self.restart_probability is None:
            return False
        return derive_seed(seed, "restart", number) < self.restart_probability * 2**63


@dataclass(frozen=True)
class Carried:
    """Where an attack ended, for the next one.

    Args:
        vector: Attacked minus original weights, in the order of `Weights.parameters`.
        num_steps: Attack steps that led there, over all attacks since one began anew (count).
        moments: What the optimizer remembers, where that is kept.
    """

    vector: Sequence[Tensor]
    num_steps: int
    moments: "Moments | None" = None


@dataclass(frozen=True)
class Moments:
    """State of a torch optimizer by its parameters, in their order; None for one without a step.

    Args:
        entries: Copies of what the optimizer holds: tensors like the parameter, and counts.
    """

    entries: Sequence[dict[str, Any] | None]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> "Moments":
        """Copies the state of an optimizer."""
        parameters = _parameters(optimizer)
        return cls([_copied(optimizer.state.get(parameter)) for parameter in parameters])

    def give_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Lets a fresh optimizer over as many parameters go on from here."""
        for parameter, entry in zip(_parameters(optimizer), self.entries, strict=True):
            if entry is not None:
                optimizer.state[parameter] = {
                    key: _placed(value, parameter) for key, value in entry.items()
                }


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _copied(state: dict[str, Any] | None) -> dict[str, Any] | None:
    if not state:
        return None
    return {
        key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()
    }


def _placed(value: Any, parameter: Tensor) -> Any:
    """A copy: optimizers count in place, and a checkpoint may hold one count for several."""
    if not isinstance(value, Tensor):
        return value
    # Counts stay where torch put them, on the CPU unless the kernel is fused.
    return value.to(parameter.device, copy=True) if value.ndim else value.clone()

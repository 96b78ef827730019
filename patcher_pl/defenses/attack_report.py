"""What a defense says about a simulated attack, wherever it ran."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from patcher_pl.defenses.base import Defense
from patcher_pl.errors import ConfigError
from patcher_pl.models import Weights


def account_for_attack(
    defense: Defense,
    *,
    norm: float,
    losses: Sequence[float],
    num_tokens: Sequence[int],
    number: int,
    tag: str = "attack",
) -> None:
    """Counts and logs an attack whose vector is used from now on.

    Args:
        defense: Whose cost it is.
        norm: Of the attack vector, as `checked_norm` found it.
        losses: Mean cross-entropy before every attack step (nats per answer token).
        num_tokens: Tokens of every attack step's batch, padding excluded.
        number: Attacks before this one (count).
        tag: Where it is shown.
    """
    for count in num_tokens:
        defense.cost.add(num_tokens=count)
    if defense.logger is None:
        return
    summary = {"loss": losses[-1], "loss_before": losses[0], "vector_norm": norm}
    log_now(defense, {f"{tag}/{key}": value for key, value in summary.items()})
    for index, loss in enumerate(losses, start=number * len(losses) + 1):
        defense.logger.log_metrics({f"{tag}/loss_by_attack_step": loss}, index)


def checked_norm(weights: Weights, vector: Sequence[Tensor], step: int) -> float:
    """Returns the norm of an attack vector.

    Args:
        weights: Whose attack vector it is.
        vector: The vector.
        step: Defender steps taken so far, for the message.

    Raises:
        ConfigError: If the attack diverged.
    """
    norm = float(weights.shards.norm(vector))
    if not math.isfinite(norm):
        raise ConfigError(
            f"Patcher.attacker: the simulated attack diverged at defender step {step} (norm of the "
            f"attack vector: {norm}). Lower `attacker.optimizer.lr` or set `attacker.max_grad_norm`."
        )
    return norm


def log_now(defense: Defense, metrics: Mapping[str, float]) -> None:
    """Logs at the current defender step; `self.log` would drop what falls between logging steps."""
    if defense.logger is not None:
        defense.logger.log_metrics(dict(metrics), step=defense.global_step)

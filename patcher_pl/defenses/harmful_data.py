"""What defenses without a simulated attacker do with harmful conversations."""

from collections.abc import Callable

import torch
from torch import Tensor

from patcher_pl.defenses.base import Defense
from patcher_pl.errors import ConfigError
from patcher_pl.models import Weights
from patcher_pl.types import Batch, count_tokens, move_batch


def require_attack_data(defense: Defense) -> None:
    """Refuses to start without harmful conversations.

    Raises:
        ConfigError: If the data module has none.
    """
    if not getattr(defense.trainer.datamodule, "has_attack", False):  # type: ignore[attr-defined]
        raise ConfigError(
            f"SafetyDataModule.attack: {type(defense).__name__} trains on harmful conversations too, "
            "got none. Set `data.attack`, or use SFT."
        )


def next_harmful_batch(defense: Defense, device: torch.device) -> Batch:
    """Takes the next batch of the attack data, whose position is saved with checkpoints."""
    stream = defense.trainer.datamodule.attack_stream()  # type: ignore[attr-defined]
    return move_batch(next(stream.endless()), device)


def gradients_of(
    defense: Defense, weights: Weights, loss: Callable[[], Tensor], batch: Batch
) -> tuple[list[Tensor], Tensor]:
    """Returns a gradient and the loss it is of; counts it, and leaves every `.grad` as it is.

    Args:
        defense: Whose cost it is.
        weights: By which the gradient is taken, where they are now.
        loss: One forward pass over `batch`.
        batch: Whose tokens are counted.
    """
    with weights.trainable():
        value = loss()
        found = weights.shards.gradients(value)
    defense.cost.add(num_tokens=count_tokens(batch))
    pairs = zip(found, weights.shards.tensors, strict=True)
    gradients = [torch.zeros_like(part) if g is None else g for g, part in pairs]
    return gradients, value.detach()

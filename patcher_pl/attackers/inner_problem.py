"""An attack as a mathematical object: what is minimized, on which batches, by which steps."""

from collections.abc import Sequence
from dataclasses import dataclass

from patcher_pl.attackers.loop import LossFunction
from patcher_pl.losses import differentiable_loss
from patcher_pl.optim import Update
from patcher_pl.types import Batch, count_tokens


@dataclass(frozen=True, kw_only=True)
class InnerProblem:
    """K recorded attack steps; the same object and the same weights give the same attack.

        theta_{k+1} = Update(theta_k, grad L(theta_k, batch_k)),  k = 0 .. K - 1

    Args:
        batches: One batch per step, in order (at least one).
        update: Clipping, schedule and optimizer; starts fresh.
        loss_function: Loss that the attacker lowers.

    Raises:
        ValueError: If there is no batch.
    """

    batches: Sequence[Batch]
    update: Update
    loss_function: LossFunction = differentiable_loss

    def __post_init__(self) -> None:
        if not self.batches:
            raise ValueError(
                "InnerProblem.batches must hold one batch per attack step, got none. "
                "Record at least one."
            )

    @property
    def num_steps(self) -> int:
        """Attack steps (K, count)."""
        return len(self.batches)

    @property
    def num_tokens(self) -> int:
        """Tokens of all batches, padding excluded (count)."""
        return sum(count_tokens(batch) for batch in self.batches)

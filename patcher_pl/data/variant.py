"""Attack data that differ from those of a run."""

from dataclasses import dataclass

from patcher_pl.data.mixing import Mixture
from patcher_pl.validation import require


@dataclass(frozen=True, kw_only=True)
class AttackData:
    """What one attack trains on, where that is not simply the attack data of the run.

    Args:
        data: Where rows come from; None takes the run's attack data.
        poison_ratio: Share of harmful rows (in [0, 1]), of which as many are taken as there are; None
            leaves the share as it is.
        batch_size: Conversations per batch (>= 1), on every process; None takes the run's.

    Raises:
        ValueError: If a value is out of its range.
    """

    data: Mixture | None = None
    poison_ratio: float | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        holds = self.poison_ratio is None or 0 <= self.poison_ratio <= 1
        require(self, holds, "poison_ratio", "in [0, 1] or null", "It is a share, no percentage.")
        holds = self.batch_size is None or self.batch_size >= 1
        require(self, holds, "batch_size", ">= 1 or null", "Use null for the run's.")

    def evaluations_per_step(self, run_batch_size: int) -> int:
        """Gradient evaluations that a step of the attack counts as: the run's batches, rounded up.

        Args:
            run_batch_size: Conversations per batch of the run's attack data (count, on one process).
        """
        return 1 if self.batch_size is None else -(-self.batch_size // run_batch_size)

    @property
    def is_of_run(self) -> bool:
        """Whether nothing differs."""
        return self == AttackData()

"""How long an attack vector is used: k2, chosen by how stale the last one had become."""

from dataclasses import dataclass

from patcher_pl.validation import require


@dataclass(frozen=True, kw_only=True)
class AdaptiveRefresh:
    """Chooses k2 anew after every attack, by what the vector before it had come to miss.

        gap = L_out(theta + v_new) - L_out(theta + v_old),   at the same theta and batch
        k2 <- max(min_steps, k2 / factor)   if gap > tolerance
        k2 <- min(max_steps, k2 factor)     otherwise

    A vector is stale when the loss of the model that it stands for says nothing of that of a freshly
    attacked one: the defender has learned that one point by heart. The first k2 is `refresh_every`. Where
    attacks are of several kinds, the two vectors may be of different ones.

    Costs two forward passes per attack, counted as one gradient evaluation, and a copy of the weights.

    Args:
        tolerance: Largest gap of a vector that is not stale (nats per answer token, >= 0).
        min_steps: Least k2 (count, >= 1).
        max_steps: Largest k2 (count, >= `min_steps`).
        factor: By which k2 changes (> 1).

    Raises:
        ValueError: If a value is out of its range.
    """

    tolerance: float = 0.5
    min_steps: int = 5
    max_steps: int = 1000
    factor: float = 1.5

    def __post_init__(self) -> None:
        require(self, self.tolerance >= 0, "tolerance", ">= 0", "Use 0.5 nats for a start.")
        require(self, self.min_steps >= 1, "min_steps", ">= 1", "Use 1 for the freshest.")
        holds = self.max_steps >= self.min_steps
        require(self, holds, "max_steps", f">= min_steps = {self.min_steps}", "Use 1000.")
        require(self, self.factor > 1, "factor", "> 1", "Use null for a fixed k2.")

    def adapted(self, refresh_every: int, gap: float) -> int:
        """The next k2 (count)."""
        if gap > self.tolerance:
            return max(self.min_steps, int(refresh_every / self.factor))
        return min(self.max_steps, max(refresh_every + 1, round(refresh_every * self.factor)))

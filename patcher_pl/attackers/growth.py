"""Attacks that become longer as training goes on."""

from dataclasses import dataclass
from typing import Literal

from patcher_pl.validation import require


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Curriculum of k1: attacks become longer.

    The n-th one (from 0) takes

        k1(n) = first_steps (num_steps / first_steps)^s   (geometric)
        k1(n) = first_steps + (num_steps - first_steps) s   (linear),   s = min(1, n / num_attacks)

    steps, so that compute goes into many short attacks while the model still falls to them.

    Args:
        first_steps: Steps of the first attack (count, >= 1).
        num_attacks: Attacks until they have their full length (count, >= 1).
        curve: How the length grows.

    Raises:
        ValueError: If a value is out of its range.
    """

    first_steps: int
    num_attacks: int
    curve: Literal["geometric", "linear"] = "geometric"

    def __post_init__(self) -> None:
        require(self, self.first_steps >= 1, "first_steps", ">= 1", "Use null for no growth.")
        require(self, self.num_attacks >= 1, "num_attacks", ">= 1", "Use null for no growth.")

    def num_steps(self, full: int, number: int) -> int:
        """Steps of an attack.

        Args:
            full: Steps of attacks that have grown up (count).
            number: Attacks before this one (count).
        """
        share = min(1.0, number / self.num_attacks)
        if self.curve == "linear":
            return round(self.first_steps + (full - self.first_steps) * share)
        return round(self.first_steps * (full / self.first_steps) ** share)

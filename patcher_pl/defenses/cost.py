"""What a run has spent, in units that do not depend on the machine."""

from dataclasses import asdict, dataclass


@dataclass
class Cost:
    """Counters of a run.

    Args:
        gradient_evaluations: Forward-backward passes over one batch, attacks included (count).
        tokens: Tokens in them, padding excluded (count).
    """

    gradient_evaluations: int = 0
    tokens: int = 0

    def add(self, *, num_tokens: int, gradient_evaluations: int = 1) -> None:
        """Counts gradient evaluations: one, or what something dearer amounts to."""
        self.gradient_evaluations += gradient_evaluations
        self.tokens += num_tokens

    def state(self) -> dict[str, int]:
        """Returns the counters, for a checkpoint."""
        return asdict(self)

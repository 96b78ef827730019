"""Which estimators are compared, on which attacks."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from patcher_pl.hypergradients import Adjoint, Hypergradient
from patcher_pl.optim import Optimizer
from patcher_pl.validation import require


@dataclass(frozen=True, kw_only=True)
class ComparisonGrid:
    """Every estimator on every attack: optimizers x lengths x seeds.

    Args:
        estimators: What is compared, by the name that tables and figures show.
        optimizers: The attacker's optimizers, likewise.
        num_steps: Lengths of the attack (K, counts).
        reference: What counts as the exact hypergradient; compared with nothing itself.
        longest: Estimators that are left out of longer attacks, and the longest one they get
            (count): a stored graph may not fit in memory.
        trial_step: Length of the step along each estimate after which the attack is repeated, to see
            what the estimate is good for, in units of the norm of the weights (> 0); None skips it.

    Raises:
        ValueError: If a value is out of its range, or `longest` names an unknown estimator.
    """

    estimators: Mapping[str, Hypergradient]
    optimizers: Mapping[str, Optimizer]
    num_steps: list[int]
    reference: Hypergradient = field(default_factory=Adjoint)
    longest: Mapping[str, int] = field(default_factory=dict)
    trial_step: float | None = 1e-3

    def __post_init__(self) -> None:
        for name, entries in (
            ("estimators", self.estimators),
            ("optimizers", self.optimizers),
            ("num_steps", self.num_steps),
        ):
            if not entries:
                raise ValueError(
                    f"ComparisonGrid.{name} must not be empty, got none. Name at least one."
                )
        remedy = "Give the numbers of attack steps."
        require(self, min(self.num_steps) >= 1, "num_steps", ">= 1 each", remedy)
        if "exact" in self.estimators:
            raise ValueError(
                "ComparisonGrid.estimators must not name any `exact`, which is the reference. "
                "Choose another name."
            )
        for name in self.longest:
            if name not in self.estimators:
                raise ValueError(
                    f"ComparisonGrid.longest must name entries of `estimators`, got {name!r}. "
                    f"There are {', '.join(self.estimators)}."
                )
        remedy = "Use null to save the attacks."
        require(
            self,
            self.trial_step is None or self.trial_step > 0,
            "trial_step",
            "> 0 or null",
            remedy,
        )

    def includes(self, estimator: str, num_steps: int) -> bool:
        """Whether `estimator` is tried on attacks of that length."""
        return num_steps <= self.longest.get(estimator, num_steps)

"""The hypergradient through the last steps of an attack."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from patcher_pl.attackers.inner_problem import InnerProblem
from patcher_pl.hypergradients.adjoint import Adjoint
from patcher_pl.hypergradients.base import Hypergradient, HypergradientEstimate, OuterObjective
from patcher_pl.models.weights import Weights
from patcher_pl.validation import require


@dataclass(frozen=True, kw_only=True)
class Truncated(Hypergradient):
    """Differentiates through the last `last_steps` attack steps only.

    Bias: earlier Jacobians become the identity, moments at that point constants; exact when
    `last_steps >= attack.num_steps`. Memory and time: as `Adjoint`, over `last_steps` steps.

    Args:
        last_steps: Attack steps that are differentiated (count, >= 0); 0 is first-order.
        adjoint: How they are walked back.

    Raises:
        ValueError: If `last_steps` is negative.

    References:
        Shaban et al., 2019, https://arxiv.org/abs/1810.10667, equation 7.
    """

    last_steps: int
    adjoint: Adjoint = field(default_factory=Adjoint)

    def __post_init__(self) -> None:
        require(self, self.last_steps >= 0, "last_steps", ">= 0", "Use 0 for first-order.")

    @property
    def works_sharded(self) -> bool:
        return self.adjoint.works_sharded

    def estimate(
        self,
        model: nn.Module,
        weights: Weights,
        inner: InnerProblem,
        outer_loss: OuterObjective,
        before_step: Callable[[], None] = lambda: None,
    ) -> HypergradientEstimate:
        first = max(0, inner.num_steps - self.last_steps)
        return self.adjoint.estimate_from(first, model, weights, inner, outer_loss, before_step)

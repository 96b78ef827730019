"""The hypergradient of an attack that is taken to have converged."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from patcher_pl.attackers.inner_problem import InnerProblem
from patcher_pl.hypergradients.attack_run import AttackRun
from patcher_pl.hypergradients.base import (
    Hypergradient,
    HypergradientError,
    HypergradientEstimate,
    OuterObjective,
    require_full_precision,
)
from patcher_pl.hypergradients.first_order import attacked_in_place, outer_gradient
from patcher_pl.hypergradients.hvp import HessianProduct, ReverseOverForward
from patcher_pl.hypergradients.solvers import ConjugateGradient, LinearSolver
from patcher_pl.models.weights import Weights
from patcher_pl.randomness import kept_random_state
from patcher_pl.validation import require


@dataclass(frozen=True, kw_only=True)
class Implicit(Hypergradient):
    """Solves (I + H / c) x = grad L_out(theta_K), with H the Hessian of the attack's loss there.

    Right for an attacker that minimizes L(phi) + c / 2 ||phi - theta||^2 to the end, whatever its
    steps were. Bias: real attacks stop before; for K steps of gradient descent of size lr, the c that
    is nearest is 1 / (K lr). It knows neither momentum nor the scaling of AdamW. H is that of the
    last `num_batches` batches. Memory: one Hessian-vector product and 5 vectors, independent of K.
    Time: the attack and `num_batches` products per iteration of the solver.

    Args:
        solver: How the system is solved.
        strength: c, the pull towards the start (> 0); None takes 1 / (sum of the step sizes).
        num_batches: Batches whose mean Hessian is used (count, >= 1).
        hvp: How Hessian-vector products are computed.

    Raises:
        ValueError: If a value is out of its range.

    References:
        iMAML: Rajeswaran et al., 2019, https://arxiv.org/abs/1909.04630, equation 6.
    """

    solver: LinearSolver = field(default_factory=ConjugateGradient)
    strength: float | None = None
    num_batches: int = 1
    hvp: HessianProduct = field(default_factory=ReverseOverForward)

    def __post_init__(self) -> None:
        remedy = "Use null for 1 / (sum of the attack's step sizes)."
        require(self, self.strength is None or self.strength > 0, "strength", "> 0 or null", remedy)
        remedy = "Use 1 for the last attack batch."
        require(self, self.num_batches >= 1, "num_batches", ">= 1", remedy)

    def estimate(
        self,
        model: nn.Module,
        weights: Weights,
        inner: InnerProblem,
        outer_loss: OuterObjective,
        before_step: Callable[[], None] = lambda: None,
    ) -> HypergradientEstimate:
        require_full_precision(self, weights.parameters)
        num_batches = min(self.num_batches, inner.num_steps)
        strength = self.strength
        if strength is None:
            # The pull under which the minimum is about as far away as these steps go.
            strength = 1 / sum(inner.update.lr(step) for step in range(inner.num_steps))
        with attacked_in_place(weights) as (parameters, start):
            run = AttackRun(model, parameters, inner, before_step)
            run.run_to(run.num_steps)
            loss, outer = outer_gradient(model, parameters, outer_loss)
            vector = weights.difference(start)
            positions = range(run.num_steps - num_batches, run.num_steps)

            # Solvers work without graphs; the products within them need one each.
            @torch.enable_grad()
            def product(u: list[Tensor]) -> list[Tensor]:
                before_step()
                total = [one.clone() for one in u]
                # The batches of the last steps, all at theta_K: no step is taken here.
                for run.position in positions:
                    gradients = run.gradient() if masks else outer
                    curved = run.product(self.hvp, [one.clone() for one in u], gradients)
                    for one, change in zip(total, curved, strict=True):
                        one.add_(change, alpha=1 / (strength * num_batches))
                return total

            # Differences of gradients look at the gradient at the very point, the others do not.
            masks = self.hvp.uses_gradients
            with kept_random_state(run.device):
                gradients, report = self.solver.solve(product, outer)
        # A solver that diverged (Neumann where ||H|| > c) has no error of its own to raise.
        if not all(bool(one.isfinite().all()) for one in gradients):
            raise HypergradientError(
                f"Implicit.solver: {type(self.solver).__name__} did not stay finite. Raise "
                "`strength`, or use ConjugateGradient."
            )
        products = report["num_products"] * num_batches * self.hvp.gradient_evaluations(model)
        return HypergradientEstimate(
            gradients,
            loss,
            vector,
            run.num_gradients + 1.0 + products,
            run.random_state,
            {**run.report(), **report},
        )

"""The exact hypergradient in the memory of one step: the trajectory, walked back."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

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
from patcher_pl.hypergradients.trajectories import SqrtCheckpoint, TrajectoryStore
from patcher_pl.models.weights import Weights
from patcher_pl.optim import Cotangent
from patcher_pl.randomness import kept_random_state
from patcher_pl.validation import require

NonFinite = Literal["raise", "clip", "truncate"]


@dataclass(frozen=True, kw_only=True)
class Adjoint(Hypergradient):
    """Walks the attack back, one Hessian-vector product and one optimizer derivative per step.

    With lambda the derivative of L_out by parameters and moments after a step, and mu its product
    with the derivative of the update by the gradient, both in closed form,

        (lambda_k, mu) = vjp of Update at step k        lambda_k += H(theta_k) mu

    from lambda_K = grad L_out(theta_K) down to lambda_0, the hypergradient. Exact, as is `hvp`.

    Memory: one Hessian-vector product, 9 vectors (AdamW) and the trajectory as `store` keeps it.
    Time: the attack, one product per step, and what `store` recomputes.

    Args:
        hvp: How Hessian-vector products are computed.
        store: How the trajectory is kept.
        max_adjoint_growth: Limit of ||lambda_k|| in units of ||lambda_K||; scaled down beyond. None
            for no limit. A rough attack makes lambda grow exponentially while it tells less and less
            about finite changes.
        non_finite: What to do where lambda_k is not finite: `raise` an error, `clip` (entries that
            are not finite become 0 and the rest is scaled to the norm before the step), or
            `truncate` (earlier Jacobians become the identity, as in `Truncated`).

    Raises:
        ValueError: If a value is out of its range.

    References:
        Maclaurin et al., 2015, https://arxiv.org/abs/1502.03492; MixFlow-MG,
        https://arxiv.org/abs/2505.00793; REPLAY, https://arxiv.org/abs/2503.13751.
    """

    hvp: HessianProduct = field(default_factory=ReverseOverForward)
    store: TrajectoryStore = field(default_factory=SqrtCheckpoint)
    max_adjoint_growth: float | None = None
    non_finite: NonFinite = "raise"

    def __post_init__(self) -> None:
        remedy = "Use null for no limit."
        require(
            self,
            self.max_adjoint_growth is None or self.max_adjoint_growth > 0,
            "max_adjoint_growth",
            "> 0 or null",
            remedy,
        )
        remedy = "Use raise to learn of it."
        require(
            self,
            self.non_finite in get_args(NonFinite),
            "non_finite",
            "raise, clip or truncate",
            remedy,
        )

    @property
    def works_sharded(self) -> bool:
        return self.hvp.works_sharded

    def estimate(
        self,
        model: nn.Module,
        weights: Weights,
        inner: InnerProblem,
        outer_loss: OuterObjective,
        before_step: Callable[[], None] = lambda: None,
    ) -> HypergradientEstimate:
        return self.estimate_from(0, model, weights, inner, outer_loss, before_step)

    def estimate_from(
        self,
        first: int,
        model: nn.Module,
        weights: Weights,
        inner: InnerProblem,
        outer_loss: OuterObjective,
        before_step: Callable[[], None] = lambda: None,
    ) -> HypergradientEstimate:
        """As `estimate`, with the Jacobians of the steps before step `first` left out."""
        require_full_precision(self, weights.parameters)
        # Whatever happens on the shelf (a full disk, say), the weights are put back.
        with attacked_in_place(weights) as (parameters, start), self.store.shelf() as shelf:
            run = AttackRun(model, parameters, inner, before_step)
            # Steps before `first` are taken, but leave nothing behind: nobody walks back through
            # them.
            run.run_to(first)
            self.store.record(run, shelf)
            loss, outer = outer_gradient(model, parameters, outer_loss)
            # Now, since the walk back moves the weights through the whole attack again.
            vector = weights.difference(start)
            walk = _Walk(self, inner.update.optimizer.init_cotangent(outer), run)
            # The walk replays the numbers of the way forward; the run must go on behind them, as
            # after every estimator.
            with kept_random_state(run.device):
                for gradients in self.store.walk_back(run, shelf, first):
                    before_step()
                    if not walk.step_back(run, gradients):
                        break
        products = walk.num_products * self.hvp.gradient_evaluations(model)
        return HypergradientEstimate(
            walk.cotangent.parameters,
            loss,
            vector,
            run.num_gradients + 1.0 + products,
            run.random_state,
            {**run.report(), **walk.diagnostics()},
        )


class _Walk:
    """The way back of one estimate.

    Args:
        settings: What to do with adjoints that are large or not finite.
        cotangent: Derivative of the outer loss after the last step.
        run: The attack.
    """

    def __init__(self, settings: Adjoint, cotangent: Cotangent, run: AttackRun) -> None:
        self.settings = settings
        self.cotangent = cotangent
        self.num_products = 0
        self._shards = run.shards
        self._num_steps = run.num_steps
        self._num_clipped = 0
        self._truncated_at = -1
        self._outer_norm = self._norm = float(self._shards.norm(cotangent.parameters))
        if not math.isfinite(self._outer_norm):
            raise HypergradientError(
                f"{type(settings).__name__}: the gradient of the outer loss after {run.num_steps} "
                "attack steps is not finite. Lower the attack's `optimizer.lr`."
            )

    def step_back(self, run: AttackRun, gradients: Sequence[Tensor | None]) -> bool:
        """Goes through the step at which `run` is; False ends the walk."""
        before = None
        if self.settings.non_finite == "truncate":
            before = [tensor.clone() for tensor in self.cotangent.parameters]
        # `vjp` reads the moments from which the step was taken, which is where the store has put
        # the run.
        pulled = run.inner.update.vjp(
            self.cotangent, gradients, run.state, run.position, run.shards.reduction
        )
        product = run.product(self.settings.hvp, pulled, gradients)
        self.num_products += 1
        # The gradient depends on theta, too: d theta' / d theta = (by the update) + H (by the
        # gradient).
        for one, change in zip(self.cotangent.parameters, product, strict=True):
            one.add_(change)
        norm = float(self._shards.norm(self.cotangent.parameters))
        if not math.isfinite(norm):
            # The cotangent after this step is the hypergradient of an attack that begins here.
            if before is not None:
                self.cotangent.parameters[:] = before
                self._truncated_at = run.position
                return False
            norm = self._handle_non_finite(run.position)
        limit = self.settings.max_adjoint_growth
        if limit is not None and norm > limit * self._outer_norm:
            self._scale(limit * self._outer_norm / norm)
            norm = limit * self._outer_norm
        self._norm = norm
        return True

    def diagnostics(self) -> dict[str, float]:
        growth = self._norm / self._outer_norm if self._outer_norm else math.nan
        return {
            "adjoint_growth": growth,
            "num_clipped_adjoints": float(self._num_clipped),
            "truncated_at_step": float(self._truncated_at),
        }

    def _handle_non_finite(self, step: int) -> float:
        if self.settings.non_finite == "raise":
            raise HypergradientError(
                f"{type(self.settings).__name__}: the adjoint is not finite at attack step "
                f"{step + 1} of {self._num_steps} (its norm after that step: {self._norm:.3g}). "
                "Lower the attack's `optimizer.lr`, set `optimizer.eps_root` or "
                "`max_adjoint_growth`, or choose `non_finite: clip` or `truncate`."
            )
        tensors = [*self.cotangent.parameters, *(t for s in self.cotangent.slots for t in s)]
        for tensor in tensors:
            tensor.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        norm = float(self._shards.norm(self.cotangent.parameters))
        # What is left may still be far too long: the entries beside those that overflowed. The last
        # norm that was a number is the best guess of the right one.
        if norm > self._norm:
            self._scale(self._norm / norm)
            return self._norm
        self._num_clipped += 1
        return norm

    def _scale(self, factor: float) -> None:
        self._num_clipped += 1
        for tensor in [*self.cotangent.parameters, *(t for s in self.cotangent.slots for t in s)]:
            tensor.mul_(factor)

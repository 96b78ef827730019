"""How far a hypergradient can be trusted: predicted against actual change of the outer loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patcher_pl.attackers.inner_problem import InnerProblem
from patcher_pl.hypergradients.attack_run import AttackRun
from patcher_pl.hypergradients.base import HypergradientEstimate, OuterObjective
from patcher_pl.hypergradients.first_order import attacked_in_place
from patcher_pl.models.weights import Weights
from patcher_pl.optim.clipping import inner_product
from patcher_pl.randomness import kept_random_state


@dataclass(frozen=True)
class Trust:
    """What a step was to change, and what it changed.

    Args:
        predicted: <hypergradient, step>: the change to first order (nats per answer token).
        actual: L_out after the same attack from the new weights, minus that before.
    """

    predicted: float
    actual: float

    @property
    def ratio(self) -> float:
        """Actual by predicted change: 1 for small steps of an exact hypergradient."""
        return self.actual / self.predicted if self.predicted else float("nan")


def measure_trust(
    model: nn.Module,
    weights: Weights,
    inner: InnerProblem,
    outer_loss: OuterObjective,
    estimate: HypergradientEstimate,
    step: Sequence[Tensor],
    before_step: Callable[[], None] = lambda: None,
) -> Trust:
    """Attacks the current weights once more, as `estimate` did before `step` had been taken.

    Costs K gradients and an outer loss; draws the same random numbers as the estimate did.

    Args:
        model: Module whose weights hold the step already.
        weights: Owner of its weights.
        inner: The attack of the estimate.
        outer_loss: The outer loss of the estimate.
        estimate: Hypergradient at the weights before the step.
        step: Weights now minus weights then.
        before_step: Called before every attack step; may raise.
    """
    with attacked_in_place(weights) as (parameters, _), kept_random_state(weights.shards.device):
        # The same batches are in `inner`; with the same dropout, only the step lies between both
        # attacks.
        estimate.random_state.restore()
        run = AttackRun(model, parameters, inner, before_step)
        run.run_to(run.num_steps)
        with torch.no_grad():
            after = run.shards.mean(outer_loss(model))
    along = inner_product(list(estimate.gradients), list(step), weights.shards.reduction)
    predicted = float(along)
    return Trust(predicted, after - estimate.outer_loss)

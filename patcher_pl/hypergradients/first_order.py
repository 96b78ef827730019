"""The first-order hypergradient."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patcher_pl.attackers.inner_problem import InnerProblem
from patcher_pl.hypergradients.attack_run import AttackRun
from patcher_pl.hypergradients.base import Hypergradient, HypergradientEstimate, OuterObjective
from patcher_pl.models.shards import Shards
from patcher_pl.models.weights import Vector, Weights


@dataclass(frozen=True, kw_only=True)
class FirstOrder(Hypergradient):
    """Takes the gradient after the attack for that before it: d theta_K / d theta = I.

    Bias: all curvature of the attack is left out; right for few or small steps. Memory: one
    gradient. Time: the attack and one gradient.

    References:
        FOMAML: Finn et al., 2017, https://arxiv.org/abs/1703.03400, section 5.2; Patcher,
        https://arxiv.org/abs/2606.07970, uses it with an attack vector of up to k2 steps ago.
    """

    @property
    def works_sharded(self) -> bool:
        return True

    def estimate(
        self,
        model: nn.Module,
        weights: Weights,
        inner: InnerProblem,
        outer_loss: OuterObjective,
        before_step: Callable[[], None] = lambda: None,
    ) -> HypergradientEstimate:
        with attacked_in_place(weights) as (parameters, start):
            run = AttackRun(model, parameters, inner, before_step)
            run.run_to(run.num_steps)
            loss, gradients = outer_gradient(model, parameters, outer_loss)
            return HypergradientEstimate(
                gradients,
                loss,
                weights.difference(start),
                run.num_gradients + 1.0,
                run.random_state,
                run.report(),
            )


@contextmanager
def attacked_in_place(weights: Weights) -> Iterator[tuple[list[nn.Parameter], Vector]]:
    """Lends the parameters, all trainable, and a copy of their values, which is put back.

    Without autocast: what is differentiated twice would be noise in half precision. Backward passes
    are within, since they would cast on their own.
    """
    start = weights.snapshot()
    try:
        with weights.trainable() as parameters, full_precision(parameters):
            yield parameters, start
    finally:
        weights.restore(start)


def full_precision(parameters: Sequence[Tensor]) -> AbstractContextManager[object]:
    """Switches autocast off for the device of the parameters."""
    return torch.autocast(parameters[0].device.type, enabled=False)


def outer_gradient(
    model: nn.Module, parameters: list[nn.Parameter], outer_loss: OuterObjective
) -> tuple[float, Vector]:
    """Returns the outer loss at the current parameters, and its gradient."""
    shards = Shards(model, parameters)
    loss = outer_loss(model)
    gradients: list[Tensor] = [
        # Cloned: what autograd returns may share memory with the graph, or be used by it elsewhere.
        torch.zeros_like(tensor) if one is None else one.clone()
        for one, tensor in zip(shards.gradients(loss), shards.tensors, strict=True)
    ]
    return shards.mean(loss), gradients

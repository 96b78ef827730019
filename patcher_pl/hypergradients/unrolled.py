"""The exact hypergradient by the book: one graph through the whole attack."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from patcher_pl.attackers.inner_problem import InnerProblem
from patcher_pl.hypergradients.base import (
    Hypergradient,
    HypergradientError,
    HypergradientEstimate,
    OuterObjective,
    require_full_precision,
)
from patcher_pl.hypergradients.composites import twice_differentiable_attention
from patcher_pl.hypergradients.first_order import full_precision
from patcher_pl.hypergradients.substitution import without_checkpointing
from patcher_pl.models.shards import Shards
from patcher_pl.models.weights import Weights
from patcher_pl.randomness import RandomState
from patcher_pl.types import move_batch
from patcher_pl.validation import require

Backend = Literal["torch", "higher"]


@dataclass(frozen=True, kw_only=True)
class Unrolled(Hypergradient):
    """Keeps the graph of all attack steps and backpropagates through it.

    Exact, and written without any of `Adjoint`'s parts but the update formula: its oracle in tests.
    Memory: the activations of K steps, their gradients included. Time: the attack and 2 K gradients.

    Args:
        backend: `torch` (`torch.func.functional_call`) or `higher`.

    Raises:
        ValueError: If there is no such backend.

    References:
        MAML: Finn et al., 2017, https://arxiv.org/abs/1703.03400, equation 1; higher: Grefenstette
        et al., 2019, https://arxiv.org/abs/1910.01727.
    """

    backend: Backend = "torch"

    def __post_init__(self) -> None:
        remedy = "Use torch."
        require(self, self.backend in get_args(Backend), "backend", "torch or higher", remedy)

    def estimate(
        self,
        model: nn.Module,
        weights: Weights,
        inner: InnerProblem,
        outer_loss: OuterObjective,
        before_step: Callable[[], None] = lambda: None,
    ) -> HypergradientEstimate:
        require_full_precision(self, weights.parameters)
        random_state = RandomState.capture(weights.parameters[0].device)
        with (
            weights.trainable() as parameters,
            full_precision(parameters),
            # Recomputed blocks would read the parameters that are in the module by then, not the
            # theta_k of their step.
            without_checkpointing(model),
        ):
            if self.backend == "higher":
                from patcher_pl.hypergradients.higher_backend import unroll_with_higher

                attacked, loss = unroll_with_higher(
                    model, weights.shards, inner, outer_loss, before_step
                )
            else:
                attacked, loss = _unroll(model, weights.shards, inner, outer_loss, before_step)
            found = weights.shards.averaged(
                torch.autograd.grad(loss, parameters, allow_unused=True)
            )
        gradients = [
            torch.zeros_like(parameter) if one is None else one
            for one, parameter in zip(found, parameters, strict=True)
        ]
        if not all(bool(one.isfinite().all()) for one in gradients):
            raise HypergradientError(
                "Unrolled: the hypergradient is not finite. Lower the attack's `optimizer.lr`, set "
                "`optimizer.eps_root`, or use Adjoint, which names the step."
            )
        vector = [
            after.detach() - before.detach()
            for after, before in zip(attacked, parameters, strict=True)
        ]
        return HypergradientEstimate(
            gradients, weights.shards.mean(loss), vector, 3.0 * inner.num_steps + 1.0, random_state
        )


class _Call(nn.Module):
    """A function of a module as a module, for `functional_call`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module], Tensor]) -> Tensor:
        return function(self.model)


def _unroll(
    model: nn.Module,
    shards: Shards,
    inner: InnerProblem,
    outer_loss: OuterObjective,
    before_step: Callable[[], None],
) -> tuple[list[Tensor], Tensor]:
    """Returns the attacked parameters and the outer loss at them, with their graphs."""
    caller, parameters, device = _Call(model), shards.parameters, shards.device
    names_of = {id(parameter): name for name, parameter in caller.named_parameters()}
    names = [names_of[id(parameter)] for parameter in parameters]

    def call(theta: list[Tensor], function: Callable[[nn.Module], Tensor]) -> Tensor:
        with twice_differentiable_attention():
            substitutes = dict(zip(names, theta, strict=True))
            return torch.func.functional_call(caller, substitutes, (function,))

    theta: list[Tensor] = list(parameters)
    state = inner.update.optimizer.init(theta)
    for step, recorded in enumerate(inner.batches):
        before_step()
        batch = move_batch(recorded, device)
        loss = call(theta, lambda module, batch=batch: inner.loss_function(module, batch))
        # The graph of this gradient is what makes the estimate exact, and its memory grow with K.
        own = torch.autograd.grad(loss, theta, create_graph=True, allow_unused=True)
        gradients = shards.averaged_with_graph(own)
        theta, state = inner.update.applied(theta, gradients, state, step)
    return theta, call(theta, outer_loss)

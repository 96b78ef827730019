"""The interface of a hypergradient estimator."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from patcher_pl.attackers.inner_problem import InnerProblem
from patcher_pl.errors import PatcherError
from patcher_pl.models.weights import Weights
from patcher_pl.randomness import RandomState

OuterObjective = Callable[[nn.Module], Tensor]  # The outer loss on a batch that is fixed.

SHARDED_REMEDY = (
    "Use patcher_pl.hypergradients.Adjoint with `hvp: patcher_pl.hypergradients.hvp.FiniteDifference`"
    " (alone or as `adjoint` of Truncated), FirstOrder, or a whole model on every device "
    "(`trainer.strategy: replicated`)."
)


class HypergradientError(PatcherError):
    """A hypergradient could not be computed."""


@dataclass(frozen=True)
class HypergradientEstimate:
    """What an estimator found for d L_out(theta_K(theta)) / d theta.

    Args:
        gradients: The estimate, in the order of `Weights.parameters`.
        outer_loss: L_out(theta_K) (nats per answer token for the usual losses).
        attack_vector: theta_K - theta, in the same order.
        gradient_evaluations: What it cost, attack included, in forward-backward passes over one
            batch; Hessian-vector products count by their matrix products.
        random_state: Random numbers from which the attack started.
        diagnostics: Numbers worth logging; each estimator names its own.
    """

    gradients: Sequence[Tensor]
    outer_loss: float
    attack_vector: Sequence[Tensor]
    gradient_evaluations: float
    random_state: RandomState
    diagnostics: Mapping[str, float] = field(default_factory=dict)


class Hypergradient(ABC):
    """Estimates the derivative of an outer loss after an attack by the weights before it."""

    @property
    def works_sharded(self) -> bool:
        """Whether it needs plain forward and backward passes only: all that sharded weights offer."""
        return False

    @abstractmethod
    def estimate(
        self,
        model: nn.Module,
        weights: Weights,
        inner: InnerProblem,
        outer_loss: OuterObjective,
        before_step: Callable[[], None] = lambda: None,
    ) -> HypergradientEstimate:
        """Attacks `model` from its current weights and differentiates the outcome.

        Weights, accumulated gradients and `requires_grad` are afterwards as they were, to the last
        bit. The generators of random numbers go on from where the attack and the outer loss left
        them, whatever the estimator: a backward walk replays the numbers of the way forward.

        Args:
            model: Causal LM (or any module that the loss functions can be called with).
            weights: Owner of its weights.
            inner: The attack.
            outer_loss: Called as `outer_loss(model)` with the attacked weights in place.
            before_step: Called before every step of the attack and of the way back; may raise to
                call the estimate off, in which case the weights are restored all the same.

        Raises:
            HypergradientError: If the estimator cannot treat these weights, or the result is not
                finite.
        """


def require_full_precision(estimator: Hypergradient, parameters: Sequence[Tensor]) -> None:
    """Refuses weights whose second derivatives would be noise.

    Raises:
        HypergradientError: If a parameter is in half precision or sharded.
    """
    name = type(estimator).__name__
    for parameter in parameters:
        if parameter.dtype not in (torch.float32, torch.float64):
            raise HypergradientError(
                f"{name} needs weights in float32 or float64, got {parameter.dtype}: second "
                "derivatives in half precision are mostly noise. Load the model with "
                "`language_model.dtype: float32`, or use FirstOrder."
            )
        if isinstance(parameter, DTensor) and not estimator.works_sharded:
            raise HypergradientError(
                f"{name} needs every weight whole on one device, got sharded ones. {SHARDED_REMEDY}"
            )

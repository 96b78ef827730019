"""The interfaces of an attacker's optimizer: built for torch, and stepped and differentiated here."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

Vector = list[Tensor]
Gradients = Sequence[Tensor | None]


@dataclass
class OptimizerState:
    """What an optimizer remembers between two steps.

    Args:
        steps: Steps that each parameter has taken (counts); one without a gradient takes none.
        slots: Moments, one vector each; none for plain gradient descent.
    """

    steps: list[int]
    slots: tuple[Vector, ...]


@dataclass
class Cotangent:
    """Derivative of a scalar by the parameters and moments at one moment of the optimization.

    Args:
        parameters: Derivative by each parameter.
        slots: Derivative by each moment, in the order of `OptimizerState.slots`.
    """

    parameters: Vector
    slots: tuple[Vector, ...]


class Optimizer(ABC):
    """Settings of an optimizer, of which torch makes one; holds no state of its own."""

    lr: float

    @property
    def is_differentiable(self) -> bool:
        """Whether an attack that steps by it can be differentiated."""
        return False

    @abstractmethod
    def build(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Returns a fresh torch optimizer over `parameters`."""


class DifferentiableOptimizer(Optimizer):
    """An optimizer for attacks that are differentiated.

    `init`, `step_`, `applied` and `vjp` are the update of `build` without torch's optimizer: in place
    for long attacks, as a graph for autograd, and as its closed-form derivative. Parameters whose
    gradient is None are left alone, as torch does.
    """

    @property
    @abstractmethod
    def num_slots(self) -> int:
        """Moments per parameter (count)."""

    @property
    def is_differentiable(self) -> bool:
        return True

    def differentiable(self) -> Self:
        """Returns these settings, or ones that are better conditioned, for a differentiated run.

        Raises:
            ValueError: If a setting rules that out.
        """
        return self

    def init(self, parameters: Sequence[Tensor]) -> OptimizerState:
        """Returns the state before the first step."""
        zeros = tuple([torch.zeros_like(p) for p in parameters] for _ in range(self.num_slots))
        return OptimizerState([0] * len(parameters), zeros)

    def init_cotangent(self, parameters: Vector) -> Cotangent:
        """Returns the cotangent of a scalar that depends on the parameters alone."""
        zeros = tuple([torch.zeros_like(p) for p in parameters] for _ in range(self.num_slots))
        return Cotangent(parameters, zeros)

    @torch.no_grad()
    def step_(
        self,
        parameters: Sequence[Tensor],
        gradients: Gradients,
        state: OptimizerState,
        lr: float | None = None,
    ) -> None:
        """Takes one step in place, changing `parameters` and `state`.

        Args:
            parameters: What is trained.
            gradients: One of the shape of each parameter, or None.
            state: From `init` or an earlier step.
            lr: Step size; None takes that of the settings.
        """
        lr = self.lr if lr is None else lr
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                # Before the update: bias correction counts the step that is being taken.
                state.steps[index] += 1
                slots = [slot[index] for slot in state.slots]
                self._step_at_(index, parameters[index], gradient, slots, state.steps[index], lr)

    def applied(
        self,
        parameters: Sequence[Tensor],
        gradients: Gradients,
        state: OptimizerState,
        lr: float | None = None,
    ) -> tuple[Vector, OptimizerState]:
        """Returns parameters and state after one step; autograd can differentiate them."""
        lr = self.lr if lr is None else lr
        updated = list(parameters)
        steps = list(state.steps)
        moments = tuple(list(slot) for slot in state.slots)
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                steps[index] += 1
                slots = [slot[index] for slot in state.slots]
                updated[index], new_slots = self._applied_one(
                    parameters[index], gradient, slots, steps[index], lr
                )
                for slot, new in zip(moments, new_slots, strict=True):
                    slot[index] = new
        return updated, OptimizerState(steps, moments)

    @torch.no_grad()
    def vjp(
        self,
        cotangent: Cotangent,
        gradients: Gradients,
        state: OptimizerState,
        lr: float | None = None,
    ) -> Vector:
        """Pulls a cotangent back through one step, at fixed gradients.

        Args:
            cotangent: Derivatives by what the step left; turned in place into those by what it
                found.
            gradients: Gradients that the step used.
            state: State before the step; not changed.
            lr: Step size; None takes that of the settings.

        Returns:
            Derivatives by the gradients (zero where there was none).
        """
        lr = self.lr if lr is None else lr
        pulled: Vector = []
        for index, gradient in enumerate(gradients):
            above = cotangent.parameters[index]
            if gradient is None:
                # The step left this parameter alone, so its cotangent goes through unchanged.
                pulled.append(torch.zeros_like(above))
                continue
            slots = [slot[index] for slot in state.slots]
            moments = [slot[index] for slot in cotangent.slots]
            pulled.append(
                self._vjp_one_(above, moments, gradient, slots, state.steps[index] + 1, lr)
            )
        return pulled

    def _step_at_(
        self,
        index: int,
        theta: Tensor,
        gradient: Tensor,
        slots: Sequence[Tensor],
        step: int,
        lr: float,
    ) -> None:
        """`_step_one_` for the parameter at a place, for what depends on that."""
        self._step_one_(theta, gradient, slots, step, lr)

    @abstractmethod
    def _step_one_(
        self, theta: Tensor, gradient: Tensor, slots: Sequence[Tensor], step: int, lr: float
    ) -> None:
        """`step_` for one parameter; `step` counts this one too."""

    @abstractmethod
    def _applied_one(
        self, theta: Tensor, gradient: Tensor, slots: Sequence[Tensor], step: int, lr: float
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """`applied` for one parameter."""

    @abstractmethod
    def _vjp_one_(
        self,
        above: Tensor,
        moments: Sequence[Tensor],
        gradient: Tensor,
        slots: Sequence[Tensor],
        step: int,
        lr: float,
    ) -> Tensor:
        """`vjp` for one parameter; changes `above` and `moments` in place."""

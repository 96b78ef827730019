"""The interface of a Hessian-vector product."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Vector = list[Tensor]


class HessianProduct(ABC):
    """Computes H(theta) u for the loss of one attack step."""

    @abstractmethod
    def gradient_evaluations(self, model: nn.Module) -> float:
        """What a product costs, by its matrix products, in gradients of the same loss."""

    @property
    def uses_gradients(self) -> bool:
        """Whether `product` looks at its argument `gradients`."""
        return False

    @property
    def works_sharded(self) -> bool:
        """Whether it needs plain forward and backward passes only: all that sharded weights offer."""
        return False

    @abstractmethod
    def product(
        self,
        model: nn.Module,
        parameters: Sequence[Tensor],
        loss: Callable[[], Tensor],
        vector: Vector,
        gradients: Sequence[Tensor | None],
    ) -> Vector:
        """Returns the Hessian of `loss` times `vector`.

        Args:
            model: Module that `loss` calls.
            parameters: Those of the module that the Hessian is taken by, at theta.
            loss: Computes the loss at the current parameters; every call draws the same numbers.
            vector: One tensor of the shape of each parameter.
            gradients: The gradient of the loss at theta, which some strategies use.
        """


def filled(found: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Vector:
    """Puts zeros where autograd found no dependence."""
    return [
        torch.zeros_like(parameter) if one is None else one.detach()
        for one, parameter in zip(found, parameters, strict=True)
    ]

"""Hessian-vector products by differentiating the gradient's own graph."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patcher_pl.hypergradients.composites import twice_differentiable_attention
from patcher_pl.hypergradients.hvp.base import HessianProduct, Vector, filled
from patcher_pl.hypergradients.substitution import without_checkpointing


@dataclass(frozen=True, kw_only=True)
class ReverseOverReverse(HessianProduct):
    """H u = d/dtheta <grad L(theta), u>, by backpropagation through backpropagation.

    Exact. Memory: activations of forward and backward pass, 3 to 4 gradients. Time: 3 gradients.

    References:
        Pearlmutter, 1994, https://doi.org/10.1162/neco.1994.6.1.147; Christianson, 1992.
    """

    def gradient_evaluations(self, model: nn.Module) -> float:
        return 3.0

    def product(
        self,
        model: nn.Module,
        parameters: Sequence[Tensor],
        loss: Callable[[], Tensor],
        vector: Vector,
        gradients: Sequence[Tensor | None],
    ) -> Vector:
        with torch.enable_grad(), without_checkpointing(model), twice_differentiable_attention():
            first = torch.autograd.grad(loss(), parameters, create_graph=True, allow_unused=True)
            pairs = [
                (one, u)
                for one, u in zip(first, vector, strict=True)
                # A gradient without a graph is constant: its row of the Hessian is zero.
                if one is not None and one.requires_grad
            ]
            if not pairs:
                return [torch.zeros_like(parameter) for parameter in parameters]
            outputs, weights = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, parameters, weights, allow_unused=True)
        return filled(found, parameters)

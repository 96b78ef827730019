"""Iterative solvers of (I + H / c) x = b, given products with H."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patcher_pl.optim.clipping import inner_product
from patcher_pl.validation import require

Vector = list[Tensor]
Product = Callable[[Vector], Vector]


class LinearSolver(ABC):
    """Solves A x = b approximately."""

    @abstractmethod
    def solve(self, product: Product, b: Sequence[Tensor]) -> tuple[Vector, dict[str, float]]:
        """Returns x, and what the solver has to say about it.

        Args:
            product: A times a vector; must not keep its argument.
            b: Right-hand side.
        """


@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(LinearSolver):
    """Conjugate gradients; stops early where A shows negative curvature.

    Args:
        max_iterations: Products at most (count, >= 1).
        tolerance: Residual norm at which to stop, by that of b (>= 0).

    Raises:
        ValueError: If a value is out of its range.

    References:
        Hestenes and Stiefel, 1952; as in iMAML, https://arxiv.org/abs/1909.04630, algorithm 2.
    """

    max_iterations: int = 10
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        require(
            self, self.max_iterations >= 1, "max_iterations", ">= 1", "Use FirstOrder for none."
        )
        require(
            self, self.tolerance >= 0, "tolerance", ">= 0", "Use 0 to go on until max_iterations."
        )

    @torch.no_grad()
    def solve(self, product: Product, b: Sequence[Tensor]) -> tuple[Vector, dict[str, float]]:
        # x = solution, r = b - A x, p = search direction
        x = [torch.zeros_like(one) for one in b]
        r = [one.clone() for one in b]
        p = [one.clone() for one in b]
        squared = start = float(inner_product(r, r))
        num_products, negative = 0, 0.0
        while num_products < self.max_iterations and squared > self.tolerance**2 * start:
            q = product([one.clone() for one in p])
            num_products += 1
            curvature = float(inner_product(p, q))
            # The system has no minimum along p. What is solved so far is kept; before the first
            # step that would be nothing, so b, the first-order answer, stands in.
            if not curvature > 0:
                negative = 1.0
                if num_products == 1:
                    x = [one.clone() for one in b]
                break
            alpha = squared / curvature
            for x_one, r_one, p_one, q_one in zip(x, r, p, q, strict=True):
                x_one.add_(p_one, alpha=alpha)
                r_one.sub_(q_one, alpha=alpha)
            previous, squared = squared, float(inner_product(r, r))
            for p_one, r_one in zip(p, r, strict=True):
                p_one.mul_(squared / previous).add_(r_one)
        residual = (squared / start) ** 0.5 if start else 0.0
        return x, {
            "num_products": float(num_products),
            "residual": residual,
            "negative_curvature": negative,
        }


@dataclass(frozen=True, kw_only=True)
class Neumann(LinearSolver):
    """x = sum over j < num_terms of (I - A)^j b; converges where the norm of I - A is below 1.

    Args:
        num_terms: Terms (count, >= 1); one is b itself.

    Raises:
        ValueError: If there is no term.

    References:
        Lorraine et al., 2020, https://arxiv.org/abs/1911.02590, algorithm 3.
    """

    num_terms: int = 10

    def __post_init__(self) -> None:
        require(self, self.num_terms >= 1, "num_terms", ">= 1", "Use 1 for first-order.")

    @torch.no_grad()
    def solve(self, product: Product, b: Sequence[Tensor]) -> tuple[Vector, dict[str, float]]:
        term = [one.clone() for one in b]
        x = [one.clone() for one in b]
        for _ in range(self.num_terms - 1):
            image = product([one.clone() for one in term])
            for x_one, term_one, image_one in zip(x, term, image, strict=True):
                # (I - A) times the term before.
                term_one.sub_(image_one)
                x_one.add_(term_one)
        last = float(torch.nn.utils.get_total_norm(term)) / float(
            torch.nn.utils.get_total_norm(list(b)) or 1.0
        )
        return x, {"num_products": float(self.num_terms - 1), "last_term": last}

"""Hessian-vector products: exact ones in three orders of differentiation, and differences."""

from patcher_pl.hypergradients.hvp.base import HessianProduct
from patcher_pl.hypergradients.hvp.finite_difference import FiniteDifference
from patcher_pl.hypergradients.hvp.forward_over_reverse import ForwardOverReverse
from patcher_pl.hypergradients.hvp.reverse_over_forward import ReverseOverForward
from patcher_pl.hypergradients.hvp.reverse_over_reverse import ReverseOverReverse

__all__ = [
    "FiniteDifference",
    "ForwardOverReverse",
    "HessianProduct",
    "ReverseOverForward",
    "ReverseOverReverse",
]

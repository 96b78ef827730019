"""Estimators of d L_out(theta_K(theta)) / d theta, the gradient of a bi-level problem."""

from patcher_pl.hypergradients.adjoint import Adjoint
from patcher_pl.hypergradients.base import (
    Hypergradient,
    HypergradientError,
    HypergradientEstimate,
    OuterObjective,
)
from patcher_pl.hypergradients.first_order import FirstOrder
from patcher_pl.hypergradients.implicit import Implicit
from patcher_pl.hypergradients.solvers import ConjugateGradient, Neumann
from patcher_pl.hypergradients.truncated import Truncated
from patcher_pl.hypergradients.trust import Trust, measure_trust
from patcher_pl.hypergradients.unrolled import Unrolled

__all__ = [
    "Adjoint",
    "ConjugateGradient",
    "FirstOrder",
    "Hypergradient",
    "HypergradientError",
    "HypergradientEstimate",
    "Implicit",
    "Neumann",
    "OuterObjective",
    "Truncated",
    "Trust",
    "Unrolled",
    "measure_trust",
]

"""Every hypergradient estimator, with the settings in which the tests hold it to its contract.

A new one needs an entry here and nothing else: it is then tried on any model (`tests/numerics`), in
`Patcher`, on packed batches (`tests/invariant`), and by its name from YAML (`tests/integration`).
"""

from patcher_pl.hypergradients import (
    Adjoint,
    ConjugateGradient,
    FirstOrder,
    Hypergradient,
    Implicit,
    Neumann,
    Truncated,
    Unrolled,
)
from patcher_pl.hypergradients.hvp import FiniteDifference, ReverseOverReverse
from patcher_pl.hypergradients.trajectories import GradientLog, Revolve
from tests.newcomers import Trapezoid

TABLE: dict[str, Hypergradient] = {
    "first-order": FirstOrder(),
    "unrolled": Unrolled(),
    "higher": Unrolled(backend="higher"),
    "adjoint": Adjoint(),
    "reverse-over-reverse": Adjoint(hvp=ReverseOverReverse(), store=Revolve(num_checkpoints=2)),
    "differences": Adjoint(hvp=FiniteDifference(), store=GradientLog(device="disk")),
    "truncated": Truncated(last_steps=1),
    "implicit": Implicit(solver=ConjugateGradient(max_iterations=2)),
    "neumann": Implicit(solver=Neumann(num_terms=3), strength=50.0),
    "newcomer": Trapezoid(),
}
# All but the one that Patcher is without any.
HIGHER_ORDER = {name: one for name, one in TABLE.items() if name != "first-order"}

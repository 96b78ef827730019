"""Every estimator, product and store is in the tables of the tests; a new one must be added."""

import inspect
from abc import ABC

import pytest

from patcher_pl import hypergradients
from patcher_pl.hypergradients import Hypergradient, Implicit, hvp, trajectories
from patcher_pl.hypergradients.hvp import FiniteDifference, HessianProduct
from patcher_pl.hypergradients.solvers import LinearSolver
from patcher_pl.hypergradients.trajectories import TrajectoryStore
from tests import estimator_table
from tests.numerics.hypergradients import test_exact, test_memory


def types(objects) -> set[type]:
    return {type(one) for one in objects}


def shipped_types(objects) -> set[type]:
    return {one for one in types(objects) if one.__module__.startswith("patcher_pl.")}


SOLVERS = [one.solver for one in estimator_table.TABLE.values() if isinstance(one, Implicit)]
TABLES = {
    "estimators": (Hypergradient, hypergradients, shipped_types(estimator_table.TABLE.values())),
    "solvers": (LinearSolver, hypergradients, types(SOLVERS)),
    "products": (HessianProduct, hvp, types(test_exact.EXACT.values()) | {FiniteDifference}),
    "stores": (TrajectoryStore, trajectories, types(test_exact.STORES.values())),
    "stores on disk": (TrajectoryStore, trajectories, types(test_memory.ON_DISK)),
}


def subclasses(parent: type) -> set[type]:
    found = set(parent.__subclasses__())
    return found.union(*map(subclasses, found))


@pytest.mark.parametrize(("parent", "package", "table"), TABLES.values(), ids=TABLES)
def test_the_tables_are_complete(parent: type[ABC], package, table):
    exported = {getattr(package, name) for name in package.__all__}
    public = {one for one in exported if isinstance(one, type) and issubclass(one, parent)}
    shipped = {
        one
        for one in subclasses(parent)
        if one.__module__.startswith("patcher_pl.") and not inspect.isabstract(one)
    }
    assert public - {parent} == shipped == table

"""Every estimator, product and store is in the tables of the tests; a new one must be added."""

import inspect
from abc import ABC

import pytest

from patcher_pl import hypergradients
from patcher_pl.hypergradients import Hypergradient, hvp, trajectories
from patcher_pl.hypergradients.hvp import FiniteDifference, HessianProduct
from patcher_pl.hypergradients.solvers import LinearSolver
from patcher_pl.hypergradients.trajectories import TrajectoryStore
from tests.integration import test_hypergradient_fit
from tests.numerics import test_patcher_hypergradients
from tests.numerics.hypergradients import test_any_model, test_exact, test_memory


def types(objects) -> set[type]:
    return {type(one) for one in objects}


def solvers(estimators) -> set[type]:
    return {type(one.solver) for one in estimators if hasattr(one, "solver")}


ANY_MODEL = test_any_model.ESTIMATORS.values()
IN_PATCHER = test_patcher_hypergradients.ESTIMATORS.values()
TABLES = {
    "on any model": (Hypergradient, hypergradients, types(ANY_MODEL)),
    "in Patcher": (Hypergradient, hypergradients, types(IN_PATCHER) | {hypergradients.FirstOrder}),
    "from the command line": (
        *(Hypergradient, hypergradients),
        {getattr(hypergradients, name) for name in test_hypergradient_fit.class_names()},
    ),
    "solvers": (LinearSolver, hypergradients, solvers(IN_PATCHER)),
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

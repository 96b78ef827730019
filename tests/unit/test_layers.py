"""Imports point downwards: to lower floors only, and never in a circle."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Lowest first. A package, or a module beside the packages, imports from lower floors and from itself.
FLOORS = (
    "contents errors fields files launcher private_directory progress quiet randomness shipped types validation",
    "configurations losses machine mailbox optim supervision",
    "reports world_files",
    "data jobs",
    "comparison models",
    "attackers evaluation",
    "hypergradients redteam starter worlds",
    "ablation defenses",
    "callbacks planning",
    "cli",
    "__main__",
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path): path for path in (ROOT / "patcher_pl").rglob("*.py")}


def package(module: str) -> str:
    return f"{module}.".split(".")[1]


def nodes(tree: ast.AST, types_too: bool) -> Iterator[ast.AST]:
    """All nodes, those in functions included; `if TYPE_CHECKING:` blocks only if asked for."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if types_too or not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            yield from nodes(child, types_too)


def imports(module: str, *, types_too: bool) -> set[str]:
    """The package's own modules that a module imports."""
    found: set[str] = set()
    for node in nodes(ast.parse(MODULES[module].read_text(encoding="utf-8")), types_too):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: import from `patcher_pl`, not from `.`."
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return {name for name in found if name in MODULES} - {module}


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_package_has_a_floor():
    assert {package(module) for module in MODULES} - {""} == FLOOR_OF.keys()


def test_modules_import_from_lower_floors():
    """For types too: what can only be described by what is above does not belong below."""
    upwards = [
        f"{module} imports {name}"
        for module in MODULES
        for name in imports(module, types_too=True)
        if "" not in (own := package(module), other := package(name)) and own != other
        if FLOOR_OF[other] >= FLOOR_OF[own]
    ]
    assert upwards == [], "Move what is shared to a lower floor."


def test_no_modules_import_each_other():
    """At run time, imports inside of functions included: those that put a circle off."""
    assert circle({module: imports(module, types_too=False) for module in MODULES}) == []

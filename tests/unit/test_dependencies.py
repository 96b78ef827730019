"""What the package says it needs is what it needs."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Named otherwise than what is imported.
IMPORTED_AS = {"pyyaml": "yaml"}
# Never imported here, and needed by what is.
LOADED_BY_OTHERS = {
    "tensorboard": "Lightning's TensorBoardLogger",
    "flash-attn": "transformers, for `attn_implementation: flash_attention_2`",
    "gguf": "transformers, for `gguf_file`",
    "liger-kernel": "transformers, for `liger`",
}
FOR_DEVELOPERS = {"test", "bench", "dev"}


def declared():
    """Names of what is installed for users, without versions and extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"]]
    for name in extras.keys() - FOR_DEVELOPERS:
        wanted += extras[name]
    return {re.split(r"[\[<>=!~;]", entry)[0].strip() for entry in wanted}


def imported():
    """Top-level names of everything that a module imports, wherever in it."""
    found = set()
    for path in (ROOT / "patcher_pl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").split(".")[0])
    return found - set(sys.stdlib_module_names) - {"patcher_pl"}


def test_everything_declared_is_imported():
    """Wrong if users had to install what nothing uses."""
    names = {IMPORTED_AS.get(name, name.replace("-", "_")): name for name in declared()}
    unused = names.keys() - imported()
    assert {names[module] for module in unused} == LOADED_BY_OTHERS.keys()


def test_everything_imported_is_declared():
    """Wrong if a release of another package could take away what this one uses."""
    names = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in declared()}
    assert imported() <= names

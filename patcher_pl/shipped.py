"""Where the files of the built-in testbed lie: `testbed` in place of a path names them."""

from pathlib import Path

TESTBED = Path(__file__).parent / "worlds" / "potions" / "files"


def resolve_model(path: str) -> str:
    """Returns `path`, or the directory of the testbed's base model where `path` is `testbed`."""
    return str(TESTBED / "model") if path == "testbed" else path


def resolve_data(path: str) -> str:
    """Returns `path`, or the file of the testbed where `path` starts with `testbed/`."""
    name = path.removeprefix("testbed/")
    return path if name == path else str(TESTBED / "data" / name)

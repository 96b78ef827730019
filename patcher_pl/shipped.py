"""Where the files lie that ship with the package: the built-in testbed's, and the configurations."""

import os
from collections.abc import Callable
from pathlib import Path, PurePath

TESTBED = Path(__file__).parent / "worlds" / "potions" / "files"
# An installed package holds them; in a checkout, and where that is installed editable, they lie beside it.
_INSTALLED, _IN_CHECKOUT = Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs"
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _IN_CHECKOUT
_PREFIX = "configs"


def resolve_model(path: str) -> str:
    """Returns `path`, or the directory of the testbed's base model where `path` is `testbed`."""
    return str(TESTBED / "model") if path == "testbed" else path


def resolve_data(path: str) -> str:
    """Returns `path`, or the file of the testbed where `path` starts with `testbed/`."""
    name = path.removeprefix("testbed/")
    return path if name == path else str(TESTBED / "data" / name)


def find_file(name: str, *folders: Path) -> Path | None:
    """The file that a configuration or a command line means.

    Args:
        name: A path, or the name of a shipped file, such as `configs/testbed/patcher.yaml`.
        folders: Where a relative path starts; the first that has such a file counts. Without one, the
            working directory.

    Returns:
        The first of those files, else the shipped one of that name; None where there is neither.
    """
    starts = folders or (Path(),)
    beside = next(
        (file for folder in starts if (file := _existing(name, folder, Path.is_file))), None
    )
    return beside or shipped_file(name)


def shipped_file(name: str) -> Path | None:
    """The shipped file of a name that begins with `configs/`; None for other names."""
    parts = PurePath(name).parts
    if parts[:1] != (_PREFIX,) or ".." in parts:
        return None
    return _existing(str(Path(*parts[1:])), CONFIGS, Path.is_file)


def find_beside(name: str, folder: Path, start: Path) -> Path | None:
    """The model or data of a relative path, where it lies beside the configuration that names it.

    Args:
        name: What the configuration says. With `./` or `../` in front, it means that first.
        folder: That of the configuration.
        start: The working directory, which comes first otherwise.
    """
    is_built_in = resolve_model(name) != name or resolve_data(name) != name
    if is_built_in or Path(name).is_absolute():
        return None
    is_explicit = name.startswith(("./", "../"))
    if not is_explicit and _existing(name, start, Path.exists):
        return None
    return _existing(name, folder, Path.exists)


def location_independent(text: str) -> str:
    """Returns `text` as it is wherever the package is installed: with names of shipped files for paths.

    Paths in a checkout stay; they have always been part of what runs there depend on.
    """
    return text.replace(f"{_INSTALLED}{os.sep}", f"{_PREFIX}/")


def _existing(name: str, folder: Path, exists: Callable[[Path], bool]) -> Path | None:
    try:
        path = folder / Path(name).expanduser()
        return path if name and exists(path) else None
    except (OSError, ValueError, RuntimeError):  # No name at all: a long prompt, `~nobody/...`.
        return None

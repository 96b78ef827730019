"""Where the built-in testbed lives: built on first use, then cached."""

import logging
import os
from pathlib import Path

NAME = "testbed"

logger = logging.getLogger(__name__)


def cache_directory() -> Path:
    """The cache of this package: `PATCHER_PL_CACHE`, else `~/.cache/patcher_pl`."""
    configured = os.environ.get("PATCHER_PL_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "patcher_pl"


def resolve_model(path: str) -> str:
    """Returns `path`, or the directory of the testbed's base model where `path` is `testbed`."""
    return str(testbed_directory() / "model") if path == NAME else path


def resolve_data(path: str) -> str:
    """Returns `path`, or the file of the testbed where `path` starts with `testbed/`."""
    prefix = f"{NAME}/"
    return (
        str(testbed_directory() / "data" / path.removeprefix(prefix))
        if path.startswith(prefix)
        else path
    )


def testbed_directory() -> Path:
    """The cached testbed of this version of its recipe; builds it when it is not there yet."""
    from filelock import FileLock

    from patcher_pl.testbed.build import build_testbed, fingerprint

    directory = cache_directory() / f"{NAME}-{fingerprint()}"
    if not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):  # Several processes may start at the same time.
            if not directory.is_dir():
                logger.info("Building the testbed in %s, once; takes about a minute.", directory)
                build_testbed(directory)
    return directory

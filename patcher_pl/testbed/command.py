"""The `testbed` command."""

import shutil
from pathlib import Path

from patcher_pl.errors import ConfigError
from patcher_pl.files import write_atomically
from patcher_pl.shipped import TESTBED


def run_testbed(out: Path, overwrite: bool = False) -> None:
    """Writes the built-in testbed: `model/` (a Hugging Face directory) and `data/*.jsonl`.

    Args:
        out: Folder to create.
        overwrite: Replace `out` where it exists.

    Raises:
        ConfigError: If `out` exists and may not be replaced.
    """
    if out.exists() and not overwrite:
        raise ConfigError(f"--out {out} exists. Give another folder, or --overwrite true.")
    write_atomically(out, _copy)
    print(f"Testbed written to {out}: model/ and data/")


def _copy(folder: Path) -> None:
    # Not `copytree`: installed files may be read-only, and the user's umask decides about copies.
    for file in (path for path in TESTBED.rglob("*") if path.is_file()):
        copy = folder / file.relative_to(TESTBED)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)

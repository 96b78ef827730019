"""The `testbed` command."""

from pathlib import Path

from patcher_pl.errors import ConfigError
from patcher_pl.testbed.build import build_testbed


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
    build_testbed(out)
    print(f"Testbed written to {out}: model/ and data/")

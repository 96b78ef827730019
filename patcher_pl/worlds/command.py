"""The `testbed` command."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from patcher_pl.configurations import SUFFIXES
from patcher_pl.errors import ConfigError
from patcher_pl.files import write_atomically
from patcher_pl.world_files import BuiltFile, locked

if TYPE_CHECKING:
    from patcher_pl.worlds.base import World


def run_testbed(
    out: Path, world: str = "potions", model: str | None = None, overwrite: bool = False
) -> None:
    """Writes a world with exact answers: `data/*.jsonl`, and `model/` where it brings its own.

    A world that is built for a model is kept for paths that name it, and taken from there.

    Args:
        out: Folder to create.
        world: `potions` (the built-in testbed, a tiny model of its own), `facts` (what `model` knows;
            capital cities are forbidden), or the YAML file of a world like that.
        model: Directory or hub id of the chat model that a world of facts is about.
        overwrite: Replace `out` where it exists.

    Raises:
        ConfigError: If `out` exists and may not be replaced, or the world cannot be written.
    """
    if out.exists() and not overwrite:
        raise ConfigError(f"--out {out} exists. Give another folder, or --overwrite true.")
    chosen = _world(world)

    def write(folder: Path) -> None:
        folder.mkdir()
        chosen.write(folder, model)

    kept = None if model is None or world == "potions" else BuiltFile(world, model, "").folder()
    # What builds worlds for paths is this command, with their place as `out`.
    if kept is None or kept == out:
        write_atomically(out, write)
    else:
        with locked(kept):
            if not kept.is_dir():
                write_atomically(kept, write)

        def copy(folder: Path) -> None:
            shutil.copytree(kept, folder)

        write_atomically(out, copy)
    there = " and ".join(f"{path.name}/" for path in sorted(out.iterdir()) if path.is_dir())
    print(f"Testbed written to {out}: {there}")


def _world(name: str) -> "World":
    # Inside, since who asks for `--help` need not wait for what loads models.
    if name == "potions":
        from patcher_pl.worlds.potions.world import Potions

        return Potions()
    if name == "facts" or name.endswith(SUFFIXES):
        from patcher_pl.worlds.facts.world import FactsWorld

        return FactsWorld(name)
    raise ConfigError(f"--world must be potions, facts or a YAML file, got {name!r}.")

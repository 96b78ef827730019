"""Where the files of worlds lie: `testbed/FILE` ships, `WORLD:MODEL/FILE` is built when it is first read."""

import hashlib
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from patcher_pl.configurations import SUFFIXES
from patcher_pl.contents import data_digest, file_digest, model_digest
from patcher_pl.errors import DataError
from patcher_pl.shipped import resolve_data as resolve_shipped
from patcher_pl.shipped import resolve_model
from patcher_pl.supervision import SUPERVISED

FACTS = Path(__file__).parent / "worlds" / "facts" / "facts.yaml"
# Raised whenever the same model and world would give other files.
VERSION = 3

_log = logging.getLogger(__name__)


def world_file(world: str) -> Path:
    """The file that says what is true in a world of facts: the `facts` that ship, or a user's."""
    return FACTS if world == "facts" else Path(world).expanduser()


def resolve_data(path: str) -> str:
    """Returns the file that `path` stands for; builds the world of `WORLD:MODEL/FILE` unless it is there.

    Raises:
        DataError: If the world cannot be built, or has no such file.
    """
    built = BuiltFile.named(path)
    return resolve_shipped(path) if built is None else str(built.fetch())


def contents_of(path: str, revision: str | None) -> str | None:
    """Digest of what `path` holds, without building a world; None if unknown. See `data_digest`."""
    built = BuiltFile.named(path)
    if built is None:
        return data_digest(resolve_shipped(path), revision)
    return f"{built.key()}/{built.name}"


@dataclass(frozen=True)
class BuiltFile:
    """A file of a world that is built for a model.

    Args:
        world: `facts`, or a YAML file.
        model: Directory or hub id.
        name: Of the file: `safe.jsonl`.
    """

    world: str
    model: str
    name: str

    @classmethod
    def named(cls, path: str) -> "BuiltFile | None":
        """Reads `WORLD:MODEL/FILE`; None where `path` is something else."""
        world, _, rest = path.partition(":")
        model, _, name = rest.rpartition("/")
        if not model or not (world == "facts" or world.endswith(SUFFIXES)):
            return None
        return cls(world, model, name)

    def key(self) -> str:
        """Digest of all that the files follow from: world, model with tokenizer, and how it is asked.

        Raises:
            DataError: If world or model cannot be found.
        """
        file = world_file(self.world)
        if not file.is_file():
            raise DataError(f"{self.world}: no such file. Give `facts`, or the file of a world.")
        model = model_digest(resolve_model(self.model))
        if model is None:
            raise DataError(
                f"{self.world}:{self.model}/{self.name}: there is no model {self.model!r}, here or on "
                "the hub. `python -m tools.get_model` gets small ones; see docs/worlds.md."
            )
        content = json.dumps([file_digest(file), model, VERSION])
        return hashlib.sha256(content.encode()).hexdigest()[:24]

    def folder(self) -> Path:
        """Where in the cache the world of the file lies, or will lie."""
        return _cache() / f"{world_file(self.world).stem}-{self.key()}"

    def fetch(self) -> Path:
        """The file in the cache; built first, by one process at a time, unless it is there."""
        folder = self.folder()
        if not folder.is_dir():
            with locked(folder):
                if not folder.is_dir():  # Built by another process meanwhile.
                    self._build(folder)
        file = folder / "data" / self.name
        if not file.is_file():
            there = ", ".join(sorted(path.name for path in file.parent.iterdir()))
            raise DataError(f"{self.world}:{self.model} has no {self.name}. It has {there}.")
        return file

    def _build(self, folder: Path) -> None:
        _log.info("Asking %s what it knows, once: minutes on a CPU. Kept in %s", self.model, folder)
        # In a process of its own: nothing of this one's random generators and memory is touched.
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "patcher_pl", "testbed", "--world", self.world),
                *("--model", self.model, "--out", str(folder)),
            ],
            stdin=subprocess.PIPE,  # Closes when this process dies, and the other ends.
            stdout=subprocess.DEVNULL,  # Progress and errors are on the other stream.
            env={**os.environ, SUPERVISED: "1"},
        )
        assert process.stdin is not None
        try:
            status = process.wait()
        finally:
            process.stdin.close()
        if status:
            raise DataError(
                f"The world {self.world} could not be built for {self.model} (status {status}); what "
                "was wrong stands above."
            )


def locked(folder: Path) -> FileLock:
    """Keeps others from building a world of the cache for the length of a block."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_suffix(".lock"))


def _cache() -> Path:
    own = os.environ.get("XDG_CACHE_HOME")
    return (Path(own) if own else Path.home() / ".cache") / "patcher_pl" / "worlds"

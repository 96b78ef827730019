"""Many runs of `fit` that differ in a few options, each a process with a directory of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patcher_pl.cli.run_directory import RunDirectory
from patcher_pl.files import write_json
from patcher_pl.processes import Children, run_all
from patcher_pl.reports.environment import usable_cpus
from patcher_pl.reports.results import Results
from patcher_pl.reports.settings import fingerprint
from patcher_pl.supervision import SUPERVISED

STATE = "sweep.json"


@dataclass(frozen=True)
class Fit:
    """One run of `fit`.

    Args:
        directory: Its `--run_dir`, where its `log.txt` goes too.
        arguments: Its other options.
        digest: Of its settings: a directory with another one is begun afresh.
    """

    directory: Path
    arguments: list[str]
    digest: str

    @classmethod
    def plan(cls, directory: Path, base: Path, options: Mapping[str, Any]) -> "Fit":
        """The run of configuration `base` with `options` (dotted names and values) changed.

        Values that are files (`Path`) count with their content.
        """
        changed = [f"--{key}={_as_option(value)}" for key, value in options.items()]
        arguments = ["--config", str(base), *changed]
        files = [base, *(value for value in options.values() if isinstance(value, Path))]
        contents = [file.read_text(encoding="utf-8") for file in files]
        digest = fingerprint([arguments, *contents])
        return cls(directory, arguments, digest)

    @property
    def is_done(self) -> bool:
        """Whether an earlier call finished exactly this run."""
        return self._state == {"fingerprint": self.digest, "done": True}

    @property
    def is_resumable(self) -> bool:
        """Whether an earlier call began exactly this run and saved a checkpoint."""
        checkpoint = RunDirectory(self.directory).checkpoints / "last.ckpt"
        return self._state.get("fingerprint") == self.digest and checkpoint.exists()

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.directory / "log.txt"

    @property
    def results(self) -> Results:
        """What it found out."""
        return Results.load(RunDirectory(self.directory).results)

    def mark(self, *, done: bool) -> None:
        """Remembers which settings the directory belongs to, and whether they are finished."""
        write_json(self.directory / STATE, {"fingerprint": self.digest, "done": done})

    @property
    def _state(self) -> dict[str, Any]:
        path = self.directory / STATE
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def run_fits(fits: Sequence[Fit], num_processes: int | None, label: str = "fit") -> list[Fit]:
    """Runs what is not done yet and returns what failed; interrupted runs go on where they were.

    Args:
        fits: All runs.
        num_processes: Runs at the same time; as many as there are CPUs where it is None. CPUs are
            shared out among them.
        label: What the progress bar calls them.

    Raises:
        RunInterrupted: If a signal stopped them; they saved checkpoints.
    """
    at_once = min(num_processes or usable_cpus(), len(fits))
    threads = max(1, usable_cpus() // at_once)
    todo = [fit for fit in fits if not fit.is_done]
    print(f"{len(fits)} runs, {len(fits) - len(todo)} done already, {at_once} at a time.")

    def run(fit: Fit, children: Children) -> bool:
        return _run(fit, threads, children)

    saved = "the runs under way saved checkpoints"
    return run_all(todo, run, num_processes=at_once, label=label, saved=saved)


def _run(fit: Fit, num_threads: int, children: Children) -> bool:
    fit.directory.mkdir(parents=True, exist_ok=True)
    how = ["--ckpt_path=last"] if fit.is_resumable else ["--overwrite=true"]
    fit.mark(done=False)
    command = [
        *(sys.executable, "-m", "patcher_pl", "fit", *fit.arguments),
        *("--run_dir", str(fit.directory), *how),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
    ]
    with fit.log.open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # Closes when this process dies, and the run ends.
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(num_threads), SUPERVISED: "1"},
            start_new_session=True,
        )
        assert process.stdin is not None
        children.add(process)
        succeeded = process.wait() == 0
        children.remove(process)
        process.stdin.close()
    if succeeded:
        fit.mark(done=True)
    return succeeded


def _as_option(value: Any) -> str:
    # jsonargparse hands class_path mappings over as namespaces.
    return str(value) if isinstance(value, str | Path) else json.dumps(value, default=vars)

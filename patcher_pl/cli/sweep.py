"""The `sweep` command: one `fit` per setting and seed, each in its own process, one figure."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from patcher_pl.cli.run_directory import RunDirectory
from patcher_pl.errors import ConfigError, PatcherError, RunInterrupted
from patcher_pl.files import write_json
from patcher_pl.redteam.command import write_reports
from patcher_pl.reports.environment import environment, usable_cpus
from patcher_pl.reports.results import Curve, Results
from patcher_pl.reports.settings import as_settings, fingerprint

if TYPE_CHECKING:
    ConfigFile = Path
else:
    # Relative to the configuration file that names it, and checked to be readable.
    from jsonargparse.typing import Path_fr as ConfigFile

STATE = "sweep.json"


@dataclass(frozen=True)
class _Cell:
    """One `fit` of the sweep."""

    directory: Path
    arguments: list[str]
    digest: str

    @property
    def is_done(self) -> bool:
        """Whether an earlier call finished exactly this run."""
        return self._state == {"fingerprint": self.digest, "done": True}

    @property
    def is_resumable(self) -> bool:
        """Whether an earlier call began exactly this run and saved a checkpoint."""
        checkpoint = RunDirectory(self.directory).checkpoints / "last.ckpt"
        return self._state.get("fingerprint") == self.digest and checkpoint.exists()

    def mark(self, *, done: bool) -> None:
        """Remembers which settings the directory belongs to, and whether they are finished."""
        write_json(self.directory / STATE, {"fingerprint": self.digest, "done": done})

    @property
    def _state(self) -> dict[str, Any]:
        path = self.directory / STATE
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def run_sweep(
    base: ConfigFile,
    variants: dict[str, dict[str, Any]],
    run_dir: Path,
    seeds: list[int] | None = None,
    num_processes: int | None = None,
) -> Results:
    """Runs `fit` for every variant and seed and collects the curves.

    A seed sets the training seed and the red team's. Each run has a directory of its own below
    `run_dir`, with its log; the collected `results.json`, `results.csv`, `asr.png` and `asr.svg` lie
    in `run_dir`. Called again, it goes on: finished runs are not repeated and interrupted ones
    resume from their checkpoint. A run that fails is reported at the end; the others go on.

    Args:
        base: Configuration of `fit` that all runs share; relative paths start at the sweep's own
            configuration file, or else at the working directory.
        variants: Name of each variant, and the options of `fit` by which it differs.
        run_dir: Where everything goes; created when missing.
        seeds: Seeds of every variant; one run with seed 0 unless given.
        num_processes: Runs at the same time; as many as there are CPUs unless given. CPUs are
            shared out among them.

    Returns:
        What was written to `results.json`.

    Raises:
        ConfigError: If there is no variant.
        PatcherError: If a run failed.
        RunInterrupted: If a signal stopped the sweep; its runs saved checkpoints.
    """
    if not variants:
        raise ConfigError("variants: must name at least one variant, got none.")
    cells = _cells(Path(base), variants, run_dir, seeds or [0])
    num_processes = min(num_processes or usable_cpus(), len(cells))
    todo = [cell for cell in cells if not cell.is_done]
    print(f"{len(cells)} runs, {len(cells) - len(todo)} done already, {num_processes} at a time.")
    failed = _run_all(todo, num_processes)
    curves: list[Curve] = []
    for cell in cells:
        if cell.is_done:
            curves += Results.load(RunDirectory(cell.directory).results).curves
    results = Results(
        curves=curves,
        environment=environment(),
        settings=as_settings({"base": Path(base), "variants": variants, "seeds": seeds}),
    )
    results.save(RunDirectory(run_dir).results)
    if curves:
        write_reports(curves, run_dir, title="ASR after N attack steps")
    if failed:
        logs = ", ".join(str(cell.directory / "log.txt") for cell in failed)
        raise PatcherError(f"{len(failed)} of {len(cells)} runs failed; see {logs}.")
    return results


def _cells(
    base: Path, variants: dict[str, dict[str, Any]], run_dir: Path, seeds: Sequence[int]
) -> list[_Cell]:
    cells = []
    for name, overrides in variants.items():
        for seed in seeds:
            arguments = [
                *("--config", str(base)),
                *(f"--{key}={_as_option(value)}" for key, value in overrides.items()),
                *(f"--seed_everything={seed}", f"--redteam.seeds=[{seed}]"),
            ]
            directory = run_dir / name / f"seed-{seed}"
            digest = fingerprint([arguments, base.read_text(encoding="utf-8")])
            cells.append(_Cell(directory, arguments, digest))
    return cells


def _as_option(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _run_all(cells: Sequence[_Cell], num_processes: int) -> list[_Cell]:
    """Runs all cells, `num_processes` at a time, and returns those that failed."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    failed: list[_Cell] = []
    if not cells:
        return failed
    columns = ("fit", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    processes: list[subprocess.Popen[bytes]] = []
    with _stopping(processes) as stopped, Progress(*columns) as progress:
        task = progress.add_task("runs", total=len(cells))
        with ThreadPoolExecutor(num_processes) as pool:
            runs = {
                pool.submit(_run_cell, cell, num_processes, processes, stopped): cell
                for cell in cells
            }
            for run in as_completed(runs):
                if run.result() != 0:
                    failed.append(runs[run])
                progress.advance(task)
        if stopped():
            raise RunInterrupted(
                "stopped; the runs under way saved checkpoints. Go on with the same command.",
                signal=stopped() or signal.SIGINT,
            )
    return failed


def _run_cell(
    cell: _Cell,
    num_processes: int,
    processes: list[subprocess.Popen[bytes]],
    stopped: Callable[[], int],
) -> int:
    if stopped():
        return 1
    threads = str(max(1, usable_cpus() // num_processes))
    cell.directory.mkdir(parents=True, exist_ok=True)
    how = ["--ckpt_path=last"] if cell.is_resumable else ["--overwrite=true"]
    cell.mark(done=False)
    command = [
        *(sys.executable, "-m", "patcher_pl", "fit", *cell.arguments),
        *("--run_dir", str(cell.directory), *how),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
    ]
    with (cell.directory / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": threads},
            start_new_session=True,
        )
        processes.append(process)
        status = process.wait()
    if status == 0:
        cell.mark(done=True)
    return status


@contextmanager
def _stopping(processes: list[subprocess.Popen[bytes]]) -> Any:
    """Passes Ctrl-C and SIGTERM on to the runs, so that they save checkpoints and end."""
    received = 0

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal received
        received = number
        for process in processes:
            if process.poll() is None:
                process.terminate()

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

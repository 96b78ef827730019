"""Many runs of `fit` that differ in a few options, each a process with a directory of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from patcher_pl.errors import ConfigError
from patcher_pl.jobs.engine import Engine, run_missing
from patcher_pl.jobs.inputs import contents_of
from patcher_pl.jobs.job import Job
from patcher_pl.jobs.lock import InUseError, held
from patcher_pl.jobs.processes import Processes
from patcher_pl.jobs.run_directory import RunDirectory
from patcher_pl.launcher import COUNTS, launch, rank
from patcher_pl.reports.results import Results
from patcher_pl.reports.settings import fingerprint
from patcher_pl.shipped import location_independent
from patcher_pl.supervision import SUPERVISED

if TYPE_CHECKING:
    ConfigFile = Path
else:
    # Relative to the configuration file that names it, and checked to be readable.
    from jsonargparse.typing import Path_fr as ConfigFile  # noqa: F401 (for others' signatures)

# How `fit` ends that has done everything, or has saved a checkpoint because of a signal.
_IN_ORDER = (
    0,
    *(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)),
)
_POLL_S = 0.5


@dataclass(frozen=True)
class Ending:
    """How a run of `fit` ended.

    Args:
        error: Why it is not finished; None where it is.
    """

    error: str | None


@dataclass(frozen=True, kw_only=True)
class Fit(Job[Ending]):
    """One run of `fit`, in the directory of `path`, where its `log.txt` goes too.

    Args:
        arguments: Its options, but for the directory.
        num_threads: CPU threads; None leaves them to the run.
    """

    arguments: list[str]
    num_threads: int | None = None

    key: ClassVar[str] = "done"
    is_shareable: ClassVar[bool] = True

    @classmethod
    def plan(cls, directory: Path, base: Path, options: Mapping[str, Any]) -> "Fit":
        """The run of configuration `base` with `options` (dotted names and values) changed.

        It depends on their content, and on that of everything they name: see `contents_of`.

        Raises:
            ConfigError: If a configuration cannot be read.
        """
        changed = [f"--{key}={as_option(value)}" for key, value in options.items()]
        arguments = ["--config", str(base), *changed]
        named = {*contents_of(base, base.parent), *contents_of(options, Path())}
        listed = [(location_independent(name), of) for name, of in sorted(named)]
        digest = fingerprint([[*map(location_independent, arguments)], listed])
        return cls(path=directory / "run.json", digest=digest, arguments=arguments)

    @property
    def run_directory(self) -> RunDirectory:
        """Its `--run_dir`."""
        return RunDirectory(self.path.parent)

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.run_directory.root / "log.txt"

    @property
    def results(self) -> Results:
        """What it found out."""
        return Results.load(self.run_directory.results)

    @property
    def seconds(self) -> float | None:
        """How long it took, its start included; None where it is not done or that is not known."""
        return (self.read() or {}).get("seconds") if self.is_done else None

    def parse(self, content: Any) -> Ending:
        return Ending(None if content else f"see {self.log}")

    def fail(self, reason: str) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"{reason}\n")

    def perform(self, device: str) -> None:
        """Runs it; where it was interrupted, it goes on from its checkpoint."""
        goes_on = self._begin()
        if goes_on is not None:
            self._run(self._environment(device, alone=True), goes_on=goes_on)

    def perform_together(self, device: str) -> None:
        """As `perform`; every process starts one of the run's own, for a strategy that shards."""
        is_first, environment = rank() == 0, self._environment(device, alone=False)
        goes_on = self._begin() if is_first else self._begun_by_first()
        if goes_on is None or self._run(environment, goes_on=goes_on, is_first=is_first):
            sys.exit(1)

    def _begin(self) -> bool | None:
        """Prepares the directory; whether there is a checkpoint to go on from, None if it is in use."""
        checkpoint = self.run_directory.checkpoints / "last.ckpt"
        try:
            with held(self.run_directory.root, is_part=True):  # Nobody else may be working there.
                goes_on = self.load() is not None and checkpoint.exists()
                if not goes_on:
                    # Before the digest is written, or a checkpoint of other settings would pass for
                    # its own.
                    self.run_directory.clear()
                self.write(False, launch=launch(), goes_on=goes_on)
        except InUseError as error:
            self.fail(str(error))  # This run's alone.
            return None
        return goes_on

    def _begun_by_first(self) -> bool:
        """What the first process has decided, which ends the others where it decides nothing."""
        while (found := self.read()) is None or found.get("launch") != launch():
            time.sleep(_POLL_S)
        goes_on: bool = found["goes_on"]
        return goes_on

    def _run(self, environment: dict[str, str], *, goes_on: bool, is_first: bool = True) -> bool:
        """Runs `fit`; whether that failed, without a checkpoint. The first process marks the end."""
        began = time.monotonic()
        command = [
            *(sys.executable, "-m", "patcher_pl", "fit", *self.arguments),
            *("--run_dir", str(self.run_directory.root)),
            "--ckpt_path=last" if goes_on else "--overwrite=true",
            *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
        ]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # Closes when this process dies, and the run ends.
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            assert process.stdin is not None
            try:
                status = process.wait()
            except KeyboardInterrupt:
                process.terminate()
                process.wait()  # It saves a checkpoint.
                raise
            finally:
                process.stdin.close()
        if status == 0 and is_first:
            # Of one that went on from a checkpoint, this process has seen the rest alone.
            took = {} if goes_on else {"seconds": round(time.monotonic() - began, 3)}
            self.write(True, **took)
        return status not in _IN_ORDER

    def _environment(self, device: str, *, alone: bool) -> dict[str, str]:
        environment = {**os.environ, SUPERVISED: "1"}
        if alone:  # Of the processes of a launcher, such as Ray's workers, none has a part in it.
            for name in COUNTS:
                environment.pop(name, None)
        if self.num_threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.num_threads)
        kind, _, index = device.partition(":")
        if kind == "cuda" and index:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = (
                visible.split(",")[int(index)] if visible else index
            )
        return environment


def run_fits(
    fits: Sequence[Fit], engine: Engine | None = None, num_processes: int | None = None
) -> list[Fit]:
    """Runs what is not done yet and returns what failed; interrupted runs go on where they were.

    Raises:
        ConfigError: See `choose_engine`.
        RunInterrupted: If a signal stopped them; they saved checkpoints.
    """
    engine = choose_engine(engine, num_processes)
    num_threads = engine.num_threads(len(fits))
    # Which devices a run takes is for its own configuration, unless the engine deals them out.
    return run_missing(
        [replace(fit, num_threads=num_threads) for fit in fits], engine, "auto", "runs"
    )


def choose_engine(engine: Engine | None, num_processes: int | None) -> Engine:
    """The engine of a command; so many `Processes` where none is given, one per CPU for None.

    Raises:
        ConfigError: If both an engine and a number of processes are given.
    """
    if engine is None:
        return Processes(num_processes=num_processes)
    if num_processes is not None:
        raise ConfigError(
            f"num_processes is for the default engine, got {num_processes} and {engine}. "
            "Set engine.init_args.num_processes instead."
        )
    return engine


def plan_sweep(
    base: Path, variants: Mapping[str, Mapping[str, Any]], run_dir: Path, seeds: Sequence[int]
) -> list[Fit]:
    """The runs of a sweep."""
    return [
        Fit.plan(run_dir / name / f"seed-{seed}", base, {**options, **seed_options(seed)})
        for name, options in variants.items()
        for seed in seeds
    ]


def seed_options(seed: int) -> dict[str, Any]:
    """The options of `fit` that give training and red team the same seed."""
    return {"seed_everything": seed, "redteam.seeds": [seed]}


OptionValue = bool | int | float | str | list | dict | None
"""A value of an option of `fit`, which `fit` parses: jsonargparse expands a class in an `Any` with all
arguments it may have, also with those that `fit` must not be given, such as a schedule's optimizer."""


def as_option(value: Any) -> str:
    """A value of an option as the command line takes it."""
    return str(value) if isinstance(value, str | Path) else json.dumps(value)

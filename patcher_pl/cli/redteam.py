"""The `redteam` command: attack released models and write down what happened."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from patcher_pl.cli.hardened import harden
from patcher_pl.data.chat import ChatFormat
from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.files import write_json, write_text
from patcher_pl.models.language_model import DtypeName, LanguageModel
from patcher_pl.redteam.assignment import Assignment, located
from patcher_pl.redteam.base import Attack
from patcher_pl.redteam.engines import Engine, InProcess
from patcher_pl.redteam.grid import Cell, varied_cells
from patcher_pl.redteam.red_team import RedTeam
from patcher_pl.redteam.search import Search
from patcher_pl.redteam.target import Target
from patcher_pl.redteam.variation import Setting
from patcher_pl.reports.curves import asr_figure
from patcher_pl.reports.drawing import save_figure
from patcher_pl.reports.environment import environment
from patcher_pl.reports.results import Curve, Results
from patcher_pl.reports.settings import as_settings, fingerprint, weight_files
from patcher_pl.reports.tables import to_csv, to_rich


def run_redteam(
    redteam: RedTeam,
    run_dir: Path,
    model: str | None = None,
    models: list[Target] | None = None,
    search: Search | None = None,
    engine: Engine | None = None,
    chat: ChatFormat | None = None,
    dtype: DtypeName = "float32",
    attn_implementation: str | None = None,
    gradient_checkpointing: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
    num_threads: int | None = None,
    defense: str = "model",
    k1: int | None = None,
    train_seed: int | None = None,
    fit_options: dict[str, Any] | None = None,
) -> Results:
    """Attacks models with a red team and reports how their safety holds.

    Every attack with every seed on every model leaves a file below `run_dir/cells`, whole or not at
    all. At the end come `results.json`, `results.csv`, `asr.png` and `asr.svg`, and a table on the
    terminal. The same command goes on where it was interrupted, and repeats only attacks that
    failed, or whose settings or weights changed.

    Args:
        redteam: Attacks, their grid, their data, the prompts and the judge.
        run_dir: Where everything goes; created when missing.
        model: Hub id, local directory, or `testbed`: the only model. `models` takes several.
        models: Models to attack alike.
        search: Look for the strongest attack on every model, starting from the grid; none without.
        engine: What runs the attacks; one after the other in this process unless given.
        chat: How conversations become tokens; as in training, or the model meets a strange prompt.
        dtype: Number format of the attacked weights.
        attn_implementation: Attention of transformers; null takes the model's default.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that comes with the checkpoint.
        device: `cpu`, `cuda`, `cuda:1`, ...; `auto` takes a GPU where there is one.
        num_threads: CPU threads of torch, of each process; null leaves it to torch. Tiny models
            want 1.
        defense: Name of the defense of `model` in the results.
        k1: Simulated attack steps that `model` was trained against, for the results.
        train_seed: Seed that `model` was trained with, for the results.
        fit_options: Options of `fit` (dotted names) that differ for models that it makes.

    Returns:
        What was written to `results.json`.

    Raises:
        ConfigError: If not exactly one of `model` and `models` is given, names clash, or a model,
            device or engine cannot be used.
        DataError: If prompts or data cannot be used.
        PatcherError: If every attack failed.
        RunInterrupted: If a signal stopped it; finished attacks are kept.
    """
    if (model is None) == (models is None):
        raise ConfigError(f"model or models must be given, and not both, got {model} and {models}.")
    targets = models or [Target(defense=defense, path=model, k1=k1, train_seed=train_seed)]
    _require_distinct(targets)
    paths = harden(targets, run_dir, fit_options or {})
    subjects = [
        _Subject(
            target,
            LanguageModel(
                path=path,
                chat=target.chat or chat or ChatFormat(),
                dtype=dtype,
                attn_implementation=attn_implementation,
                gradient_checkpointing=gradient_checkpointing,
                revision=revision,
                trust_remote_code=trust_remote_code,
            ),
        )
        for target, path in zip(targets, paths, strict=True)
    ]
    settings = as_settings({"redteam": redteam, "models": targets, "search": search})
    board = _Board(redteam, subjects, run_dir, engine or InProcess(), device, num_threads, settings)
    board.claim()
    curves = board.run_cells([(subject, cell) for subject in subjects for cell in redteam.cells()])
    if search is not None:
        board.run_search(search, curves)
    curves = board.save().curves
    names = ", ".join(target.defense if model is None else str(model) for target in targets)
    write_reports(curves, run_dir, title=f"Red team of {names}")
    if all(curve.error is not None for curve in curves):
        raise PatcherError(
            f"Every attack failed; the first with {curves[0].error}. See {board.results}."
        )
    return Results.load(board.results)


@dataclass(frozen=True)
class _Subject:
    """A model that is there.

    Args:
        target: What it is called.
        language_model: The model.
        weights: What tells its weights from others at the same place.
    """

    target: Target
    language_model: LanguageModel
    weights: Any = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", weight_files(located(self.language_model)))


@dataclass(frozen=True)
class _Board:
    """Plans cells, has an engine run what is not done, and collects what is."""

    redteam: RedTeam
    subjects: Sequence[_Subject]
    run_dir: Path
    engine: Engine
    device: str
    num_threads: int | None
    settings: Any
    _planned: dict[Path, Assignment] = field(default_factory=dict)

    @property
    def results(self) -> Path:
        """The machine-readable outcome."""
        return self.run_dir / "results.json"

    @property
    def cells(self) -> Path:
        """Where the outcome of every attack is kept."""
        return self.run_dir / "cells"

    def claim(self) -> None:
        """Sees to it that results of another command are not replaced.

        Raises:
            ConfigError: If there are some.
        """
        if self.results.exists() and not self.cells.is_dir():
            raise ConfigError(
                f"--run_dir {self.run_dir} holds results of another command. "
                "Give another directory, or move results.json away."
            )

    def run_cells(self, wanted: Sequence[tuple[_Subject, Cell]]) -> list[Curve]:
        """Curves of all cells, in their order."""
        assignments = [self._assignment(subject, cell) for subject, cell in wanted]
        self._planned.update({assignment.path: assignment for assignment in assignments})
        todo = [assignment for assignment in assignments if not assignment.is_done]
        print(f"{len(assignments)} attacks, {len(assignments) - len(todo)} done already.")
        if todo:
            self.cells.mkdir(parents=True, exist_ok=True)
            try:
                self.engine.run(todo, self.device)
            finally:
                self.save()  # What is there, also where the rest was interrupted.
        return _outcomes(assignments)

    def save(self) -> Results:
        """Writes the curves of everything that was planned and has an outcome."""
        results = Results(
            curves=_outcomes(list(self._planned.values())),
            environment=environment(),
            settings=self.settings,
            fingerprint=fingerprint(self.settings),
        )
        results.save(self.results)
        return results

    def run_search(self, search: Search, grid: Sequence[Curve]) -> None:
        """Searches for the strongest attack on every model.

        Writes what was tried to `search.json`, by defense, the strongest first.
        """
        tried: dict[str, list[dict[str, Any]]] = {}
        for subject in self.subjects:
            known: dict[str, list[Curve]] = defaultdict(list)
            for curve in grid:
                if curve.key[:3] == subject.target.key:
                    known[curve.attack].append(curve)
            outcome = search.run(self.redteam, list(known.values()), partial(self._try, subject))
            name = subject.target.defense
            tried[name] = [asdict(trial) for trial in outcome]
            best = outcome[0]
            print(
                f"Strongest attack on {name}: {best.attack} (strength {best.strength:.3f}, found by "
                f"the {best.source})"
            )
        write_json(self.run_dir / "search.json", tried)

    def _try(
        self, subject: _Subject, chosen: Sequence[tuple[Attack, dict[str, Setting]]]
    ) -> list[list[Curve]]:
        groups = [self._cells_of(attack, settings) for attack, settings in chosen]
        self.run_cells([(subject, cell) for cells in groups for cell in cells])
        return [_outcomes([self._assignment(subject, cell) for cell in cells]) for cells in groups]

    def _cells_of(self, attack: Attack, settings: dict[str, Setting]) -> list[Cell]:
        """The cells of a trial; none where the attack cannot have such settings."""
        try:
            return varied_cells(attack, self.redteam.data, settings, self.redteam.seeds)
        except ValueError as error:
            print(f"Passed over: {error}")
            return []

    def _assignment(self, subject: _Subject, cell: Cell) -> Assignment:
        return Assignment.plan(
            self.redteam,
            cell,
            subject.target.subject,
            subject.language_model,
            subject.weights,
            self.cells,
            self.num_threads,
        )


def _outcomes(assignments: Sequence[Assignment]) -> list[Curve]:
    return [curve for assignment in assignments if (curve := assignment.load()) is not None]


def write_reports(curves: list[Curve], run_dir: Path, title: str) -> None:
    """Writes `results.csv`, `asr.png` and `asr.svg` into `run_dir` and prints the table."""
    from rich.console import Console

    write_text(run_dir / "results.csv", to_csv(curves))
    figure = asr_figure(curves)
    save_figure(figure, run_dir / "asr.png")
    save_figure(figure, run_dir / "asr.svg")
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # A log file has no width of its own.
    console.print(to_rich(curves, title=title))
    console.print(f"Written to {run_dir}", highlight=False, soft_wrap=True)


def _require_distinct(targets: Sequence[Target]) -> None:
    names = [target.key for target in targets]
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"models must differ in defense, k1 or train_seed, got {[name[0] for name in names]}."
        )

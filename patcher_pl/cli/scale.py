"""Options of the `scale` command: the comparison of `compare` at several budgets, and what grows with them."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from patcher_pl.cli.console import wide_console
from patcher_pl.cli.errors import readable_config_errors
from patcher_pl.cli.throughput import ThroughputJob
from patcher_pl.comparison import Column, Contender, Selection, require_fresh_seeds
from patcher_pl.comparison.trials import (
    Models,
    choices,
    costs,
    curves_of,
    failed_searches,
    warn_of_unusable,
)
from patcher_pl.comparison.workload import AttackLoad, Throughput, Workload
from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.jobs import (
    ConfigFile,
    Engine,
    OptionValue,
    RunDirectory,
    choose_engine,
    run_fits,
    run_missing,
)
from patcher_pl.redteam.finetuning import FinetuningAttack
from patcher_pl.redteam.red_team import RedTeam
from patcher_pl.reports.command import run_report
from patcher_pl.reports.comparison import DefenseTrial
from patcher_pl.reports.drawing import save_figure
from patcher_pl.reports.environment import environment
from patcher_pl.reports.results import Curve, Results
from patcher_pl.reports.scaling import ScalingStudy, named_by_budget, slope_table, summary_table
from patcher_pl.reports.scaling_figure import scaling_figure
from patcher_pl.reports.settings import as_settings
from patcher_pl.reports.tables import rich_table

# Seconds between two lines on how much is left.
_EVERY_S = 120.0


def run_scale(
    defenses: dict[str, Contender],
    redteam: ConfigFile,
    selection: Selection,
    budgets: list[int],
    run_dir: Path,
    seeds: list[int] | None = None,
    options: dict[str, OptionValue] | None = None,
    dry_run: bool = False,
    num_processes: int | None = None,
    engine: Engine | None = None,
) -> ScalingStudy | None:
    """Compares defenses at several budgets, each searched anew, and fits what a gradient buys.

    At every budget, the smallest first, it does what `compare` does at one: every defense tries as
    many settings as the others, then trains one model per seed with those that did best, and all are
    attacked by `redteam`. First it says how much work that is, and about how long it will take.
    Called again, it goes on where it was interrupted, also with more budgets, defenses or seeds; what
    fails is left out and tried again by the next call.

    Writes `scaling.json` (trials, choices, costs, steps to break, fits), `scaling.csv`, `scaling.md`,
    `scaling.png` and `.svg` (steps to break against budget, a panel per attack and the worst case),
    the same as `scaling-bounded` where attacks that leave a useful model take other steps,
    `results.json` (every curve) and the page and tables of `report` into `run_dir`, after every budget.

    Args:
        defenses: Name of each in the results (`sft` marks the control), and how it is trained.
        redteam: Red team of the models, one attack per family; its seeds are those of the models.
        selection: The search.
        budgets: Gradient evaluations of every run of a column (forward-backward passes, >= 1).
        run_dir: Where everything goes; created when missing.
        seeds: Seeds of the models and of the attacks on them; 0 unless given.
        options: Options of `fit` (dotted names) for all runs; those of a defense go before.
        dry_run: Say how much work it is and how long it will take, and end.
        num_processes: Runs at the same time; as many as there are CPUs unless given.
        engine: What runs them, in place of `num_processes`; processes of this machine unless given.

    Returns:
        What was written to `scaling.json`; None of a dry run.

    Raises:
        ConfigError: If there is no defense or budget, seeds are shared with the selection, or a space
            is too small.
        PatcherError: If anything failed; the rest was done.
        RunInterrupted: If a signal stopped it; nothing finished is lost.
    """
    seeds = seeds or [0]
    if not defenses:
        raise ConfigError("defenses: must name at least one defense, got none.")
    if not budgets or min(budgets) < 1 or len(set(budgets)) < len(budgets):
        raise ConfigError(
            f"budgets: must be different numbers of gradient evaluations >= 1, got {budgets}. "
            "Give each once, such as [500, 2000, 8000]."
        )
    require_fresh_seeds(seeds, selection)
    engine = choose_engine(engine, num_processes)
    columns = [
        Column.plan(
            *(defenses, Path(redteam), selection, seeds, budget, options),
            run_dir / f"budget-{budget}",
        )
        for budget in sorted(budgets)
    ]
    loads = [_load_of(Path(file), name) for file, name in _red_teams(redteam, selection)]
    study = _Study(columns, loads[0], loads[1], engine)
    study.measure(run_dir)
    print(study.forecast())
    if dry_run:
        return None
    settings = {"defenses": defenses, "redteam": redteam, "selection": selection, "seeds": seeds}
    settings |= {"budgets": budgets, "options": options}
    with study.estimates():
        for column in columns:
            study.run(column)
            _report(study, as_settings(settings), run_dir)
    found = study.found(as_settings(settings))
    if found.views:
        page = run_dir / "report.html"
        run_report([RunDirectory(run_dir).results], out=page, title="Defenses over budgets")
    if found.lost:
        raise PatcherError(
            f"{'; '.join(found.lost)}. Everything else was done; the same command tries again."
        )
    return found


def _red_teams(redteam: ConfigFile, selection: Selection) -> list[tuple[ConfigFile, str]]:
    return [(selection.redteam, "selection.redteam"), (redteam, "redteam")]


def _load_of(file: Path, name: str) -> AttackLoad:
    """What the red team of a file does to one model with one seed."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--redteam", type=RedTeam, sub_configs=True)
    with readable_config_errors():
        team = parser.instantiate(parser.parse_args(["--redteam", str(file)])).redteam
    attacks = [cell.attack for cell in replace(team, seeds=[0]).cells()]
    trained = [attack for attack in attacks if isinstance(attack, FinetuningAttack)]
    if not trained:
        raise ConfigError(
            f"{name}: must have an attack that fine-tunes, got {', '.join(a.name for a in attacks)}. "
            "Steps to break are those of such attacks."
        )
    return AttackLoad(
        num_steps=sum(attack.num_steps for attack in trained),
        num_measurements=len(attacks) + sum(len(one.attack_steps) - 1 for one in trained),
    )


@dataclass
class _Study:
    """Where the study stands.

    Args:
        columns: One per budget, the smallest first.
        search: What the red team of the search does to a model.
        attacks: What the one at the end does.
        engine: What runs everything.
    """

    columns: Sequence[Column]
    search: AttackLoad
    attacks: AttackLoad
    engine: Engine
    throughput: Throughput = field(default_factory=Throughput)
    models: dict[int, Models] = field(default_factory=dict)
    trials: dict[int, list[DefenseTrial]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    """What failed, a line each."""

    def __post_init__(self) -> None:
        for column in self.columns:
            if all(fit.is_done for fit in column.search):
                self.models[column.budget] = column.models(choices(column.trials()))

    def measure(self, run_dir: Path) -> None:
        """Times a few gradient evaluations and a measurement, once for a `run_dir`."""
        fits = [fit for column in self.columns for fit in column.search]
        if not fits:
            raise ConfigError("budgets: no defense takes part at any of them; see its min_budget.")
        if self.engine.processes_per_job > 1:
            self.throughput = Throughput(error="runs of several processes are not measured")
            return
        num_threads = self.engine.num_threads(len(fits))
        job = ThroughputJob.plan(fits[-1], run_dir / "throughput.json", num_threads)
        run_missing([job], self.engine, "auto", "measurements of throughput")
        self.throughput = job.load() or self.throughput

    @property
    def workload(self) -> Workload:
        return Workload.of(self.columns, self.search, self.attacks, self.models)

    def forecast(self) -> str:
        """How much work it is, and how long the rest takes."""
        work = self.workload
        training = sum(run.budget for run in work.runs)
        total = work.num_evaluations
        return (
            f"{len(self.columns)} budgets, {len(work.runs)} runs of `fit`, {work.num_done} done "
            f"already: {_grouped(total)} gradient evaluations, {_grouped(training)} of them training "
            f"and at most {_grouped(total - training)} attacks. {self.left()}"
        )

    def left(self) -> str:
        """How long the rest takes, as far as that can be told."""
        work = self.workload
        num_left = len(work.runs) - work.num_done
        if self.throughput.error is not None:
            return f"How long that takes is not known ({self.throughput.error})."
        at_once = self.engine.at_once(max(num_left, 1))
        minutes = round(work.seconds_left(self.throughput) / (at_once or 1) / 60)
        workers = (
            f"with {at_once} {'process' if at_once == 1 else 'processes'}"
            if at_once
            else "of one worker; a cluster divides that"
        )
        hours, minutes = divmod(minutes, 60)
        return f"{num_left} runs to do, about {hours} h {minutes} min {workers}."

    @contextmanager
    def estimates(self) -> Iterator[None]:
        """Says now and then, while the block runs, how much is left."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(_EVERY_S):
                print(f"Study: {self.left()}", flush=True)

        threading.Thread(target=beat, name="estimates", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def run(self, column: Column) -> None:
        """Searches, trains and attacks at one budget; what fails is written down in `lost`."""
        at = f"at budget {column.budget}"
        print(f"Search {at}.")
        run_fits(column.search, self.engine)
        trials = self.trials[column.budget] = column.trials()
        chosen = choices(trials)
        self.lost += [
            f"{line.removesuffix('.')} {at}" for line in failed_searches(column.searched, chosen)
        ]
        warn_of_unusable(column.selection, trials)
        models = self.models[column.budget] = column.models(chosen)
        print(f"Models {at}. {self.left()}")
        failed = run_fits([fit for fits in models.values() for fit in fits], self.engine)
        self.lost += [f"a model {at} failed, see {fit.log}" for fit in failed]

    def curves(self) -> list[Curve]:
        """Of every model that there is."""
        return [
            replace(curve, budget=column.budget)
            for column in self.columns
            for curve in curves_of(self.models.get(column.budget, {}))
        ]

    def found(self, settings: dict[str, Any]) -> ScalingStudy:
        """What is known so far."""
        return ScalingStudy.of(
            self.curves(),
            trials=self.trials,
            costs={budget: costs(models) for budget, models in self.models.items()},
            lost=self.lost,
            environment=environment(),
            settings=settings,
        )


def _report(study: _Study, settings: dict[str, Any], run_dir: Path) -> None:
    curves, found = study.curves(), study.found(settings)
    found.save(run_dir, curves)
    if not found.views:
        return
    done = [
        fit.results
        for models in study.models.values()
        for fits in models.values()
        for fit in fits
        if fit.is_done
    ]
    Results(
        curves=named_by_budget(curves),
        environment=found.environment,
        settings=settings,
        overlap=list(dict.fromkeys(entry for results in done for entry in results.overlap)),
    ).save(RunDirectory(run_dir).results)
    console = wide_console(160)
    for end, fits in found.views.items():
        figure = scaling_figure(fits.reaches, fits.levels, fits.slopes)
        save_figure(figure, run_dir / f"scaling{end}.png")
        save_figure(figure, run_dir / f"scaling{end}.svg")
        of_whom = " of useful models" if end else ""
        levels, slopes = summary_table(fits.levels), slope_table(fits.slopes)
        console.print(rich_table(f"Steps to break{of_whom}", levels, num_names=2))
        console.print(rich_table(f"Slopes{of_whom}", slopes, num_names=2))
        console.print("\n".join(found.notes(fits, curves)), highlight=False)
    console.print(f"Written to {run_dir}", highlight=False, soft_wrap=True)


def _grouped(count: int) -> str:
    return f"{count:,}".replace(",", "\N{NO-BREAK SPACE}")

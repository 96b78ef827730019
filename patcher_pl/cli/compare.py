"""The `compare` command: defenses with equal budgets, equal searches and the same attacks."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patcher_pl.cli.fits import Fit, run_fits
from patcher_pl.cli.redteam import write_reports
from patcher_pl.cli.run_directory import RunDirectory
from patcher_pl.cli.sweep import seed_options
from patcher_pl.comparison import Contender, Selection, trial_of
from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.reports.command import run_report
from patcher_pl.reports.comparison import (
    DefenseComparison,
    DefenseTrial,
    TrainingCost,
    comparison_notes,
    defense_table,
    trial_table,
)
from patcher_pl.reports.environment import environment
from patcher_pl.reports.results import Curve, Results
from patcher_pl.reports.settings import as_settings
from patcher_pl.reports.tables import rich_table

if TYPE_CHECKING:
    ConfigFile = Path
else:
    # Relative to the configuration file that names it, and checked to be readable.
    from jsonargparse.typing import Path_fr as ConfigFile

logger = logging.getLogger(__name__)

_Models = dict[str, list[Fit]]
"""The compared models, one per seed, by defense."""


@dataclass(frozen=True)
class PlannedTrial:
    """One point of a defense's space.

    Args:
        number: 0 for the first values of the space.
        options: Options of `fit` that are tried.
        fits: Its runs, one per seed.
    """

    number: int
    options: Mapping[str, Any]
    fits: Sequence[Fit]

    def outcome(self, defense: str) -> DefenseTrial:
        """What its runs found, or which of them failed."""
        if all(fit.is_done for fit in self.fits):
            results = [fit.results for fit in self.fits]
            return trial_of(defense, self.number, self.options, results)
        logs = ", ".join(str(fit.log) for fit in self.fits if not fit.is_done)
        error = f"`fit` failed; see {logs}"
        return DefenseTrial(
            defense=defense, number=self.number, options=dict(self.options), error=error
        )


def run_compare(
    defenses: dict[str, Contender],
    redteam: ConfigFile,
    selection: Selection,
    max_gradient_evaluations: int,
    run_dir: Path,
    seeds: list[int] | None = None,
    options: dict[str, Any] | None = None,
    num_processes: int | None = None,
) -> DefenseComparison:
    """Trains defenses at an equal budget after an equal search, and attacks all of them alike.

    Every run of `fit` ends with the first step at which it has spent `max_gradient_evaluations`.
    First every defense tries as many settings as the others, on the seeds and against the red team
    of `selection`. Then each trains one model per seed with the settings that did best, and all are
    attacked by `redteam`. Every run is a process of its own; called again, the command goes on
    where it was interrupted.

    Writes `comparison.json` (trials, choices, costs), `comparison.md` (one row per defense),
    `results.json` (every curve), `asr.png`, and the page and tables of `report` into `run_dir`.

    Args:
        defenses: Name of each in the results (`sft` marks the control), and how it is trained.
        redteam: Red team of the comparison; its seeds are those of the models.
        selection: The search.
        max_gradient_evaluations: Budget of every run (forward-backward passes, count, >= 1).
        run_dir: Where everything goes; created when missing.
        seeds: Seeds of the compared models and of the attacks on them; 0 unless given.
        options: Options of `fit` (dotted names) for all runs; those of a defense go before.
        num_processes: Runs at the same time; as many as there are CPUs unless given.

    Returns:
        What was written to `comparison.json`.

    Raises:
        ConfigError: If there is no defense, seeds are shared with the selection, or a space is too
            small.
        PatcherError: If all trials of a defense failed, or a compared model did.
        RunInterrupted: If a signal stopped it; nothing finished is lost.
    """
    seeds = seeds or [0]
    if not defenses:
        raise ConfigError("defenses: must name at least one defense, got none.")
    if shared := sorted(set(seeds) & set(selection.seeds)):
        raise ConfigError(
            f"seeds: must not be among selection.seeds, got {shared} in both. Settings that were "
            "chosen with a seed look better with it."
        )
    common = {
        "trainer.max_steps": -1,
        "trainer.max_epochs": -1,
        "max_gradient_evaluations": max_gradient_evaluations,
        **(options or {}),
    }
    searched = plan_trials(defenses, selection, common, run_dir / "search")
    tried = [planned for own in searched.values() for planned in own]
    run_fits([fit for planned in tried for fit in planned.fits], num_processes, "search")
    trials = _rated(selection, searched)
    settings = {"defenses": defenses, "redteam": redteam, "selection": selection, "seeds": seeds}
    settings |= {"max_gradient_evaluations": max_gradient_evaluations, "options": options}
    comparison = DefenseComparison(
        trials=trials, costs={}, environment=environment(), settings=as_settings(settings)
    )
    comparison.save(run_dir, [])
    chosen = _choices(selection, trials, searched)
    models = {
        name: _fits(
            *(contender, common, chosen[name], Path(redteam), seeds, run_dir / "models" / name)
        )
        for name, contender in defenses.items()
    }
    failed = run_fits([fit for fits in models.values() for fit in fits], num_processes, "models")
    comparison = replace(comparison, costs=_costs(models))
    curves = _curves(models)
    comparison.save(run_dir, curves)
    _write_report(comparison, curves, run_dir)
    if failed:
        raise PatcherError(
            f"{len(failed)} runs failed; see {', '.join(str(fit.log) for fit in failed)}. "
            "The same command tries them again."
        )
    return comparison


def plan_trials(
    defenses: Mapping[str, Contender],
    selection: Selection,
    common: Mapping[str, Any],
    directory: Path,
) -> dict[str, list[PlannedTrial]]:
    """The search of every defense.

    Raises:
        ConfigError: If the space of a defense has fewer points than there are trials.
    """
    planned: dict[str, list[PlannedTrial]] = {}
    redteam, seeds = Path(selection.redteam), selection.seeds
    for name, contender in defenses.items():
        try:
            tried = contender.trials(selection.num_trials, selection.sampling_seed)
        except ValueError as error:
            raise ConfigError(f"defenses.{name}.{error}") from error
        planned[name] = [
            PlannedTrial(
                number,
                options,
                _fits(
                    *(contender, common, options, redteam, seeds),
                    directory / name / f"trial-{number}",
                ),
            )
            for number, options in enumerate(tried)
        ]
    return planned


def _fits(
    contender: Contender,
    common: Mapping[str, Any],
    chosen: Mapping[str, Any],
    redteam: Path,
    seeds: Sequence[int],
    directory: Path,
) -> list[Fit]:
    """One run per seed; options of the contender go before `common` ones, `chosen` before both."""
    options = {"redteam": redteam.resolve(), **common, **contender.options, **chosen}
    return [
        Fit.plan(directory / f"seed-{seed}", Path(contender.fit), {**options, **seed_options(seed)})
        for seed in seeds
    ]


def _rated(
    selection: Selection, searched: Mapping[str, Sequence[PlannedTrial]]
) -> list[DefenseTrial]:
    """Every trial with what it found, the best of each defense chosen."""
    trials = []
    for name, planned in searched.items():
        own = [one.outcome(name) for one in planned]
        best = selection.choose(own) if any(trial.error is None for trial in own) else None
        trials += [replace(trial, is_chosen=trial is best) for trial in own]
    return trials


def _choices(
    selection: Selection,
    trials: Sequence[DefenseTrial],
    searched: Mapping[str, Sequence[PlannedTrial]],
) -> dict[str, dict[str, Any]]:
    """The options that each defense goes on with.

    Raises:
        PatcherError: If all trials of a defense failed.
    """
    chosen = {trial.defense: trial for trial in trials if trial.is_chosen}
    for name, planned in searched.items():
        if name not in chosen:
            log = planned[0].fits[0].log
            raise PatcherError(f"defenses.{name}: every trial failed; the first left {log}.")
        if not selection.is_usable(chosen[name]):
            logger.warning(
                "%s: no trial left a usable model; the comparison goes on with the closest one.",
                name,
            )
    return {name: trial.options for name, trial in chosen.items()}


def _costs(models: _Models) -> dict[str, list[TrainingCost]]:
    return {
        name: [
            TrainingCost(
                gradient_evaluations=fit.results.settings["gradient_evaluations"],
                num_steps=fit.results.settings["num_steps"],
            )
            for fit in fits
            if fit.is_done
        ]
        for name, fits in models.items()
    }


def _curves(models: _Models) -> list[Curve]:
    """Every curve, under the name that its defense has in the comparison."""
    return [
        replace(curve, defense=name)
        for name, fits in models.items()
        for fit in fits
        if fit.is_done
        for curve in fit.results.curves
    ]


def _write_report(comparison: DefenseComparison, curves: list[Curve], run_dir: Path) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=180)  # A log file has no width of its own.
    console.print(rich_table("Search of settings", trial_table(comparison.trials)))
    for trial in comparison.trials:
        if trial.error is not None:
            said = f"{trial.defense}, trial {trial.number}: {trial.error}"
            console.print(said, highlight=False, markup=False, soft_wrap=True)
    if not any(curve.attack_steps for curve in curves):
        return
    results = RunDirectory(run_dir).results
    Results(curves=curves, environment=comparison.environment, settings=comparison.settings).save(
        results
    )
    write_reports(curves, run_dir, title="Fine-tuning attacks")
    console.print(rich_table("Comparison", defense_table(curves, comparison.costs)))
    console.print("\n".join(comparison_notes(curves)), highlight=False)
    run_report([results], out=run_dir / "report.html", title="Defenses on equal terms")

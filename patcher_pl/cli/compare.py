"""Options of the `compare` command: defenses with equal budgets, equal searches and the same attacks."""

from dataclasses import replace
from pathlib import Path

from patcher_pl.cli.console import wide_console, write_reports
from patcher_pl.comparison import Column, Contender, Selection, require_fresh_seeds
from patcher_pl.comparison.trials import (
    choices,
    costs,
    curves_of,
    failed_searches,
    warn_of_unusable,
)
from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.jobs import ConfigFile, Engine, OptionValue, RunDirectory, run_fits
from patcher_pl.reports.command import run_report
from patcher_pl.reports.comparison import (
    DefenseComparison,
    comparison_notes,
    defense_table,
    trial_table,
)
from patcher_pl.reports.environment import environment
from patcher_pl.reports.results import Curve, Overlap, Results
from patcher_pl.reports.settings import as_settings
from patcher_pl.reports.tables import rich_table


def run_compare(
    defenses: dict[str, Contender],
    redteam: ConfigFile,
    selection: Selection,
    max_gradient_evaluations: int,
    run_dir: Path,
    seeds: list[int] | None = None,
    options: dict[str, OptionValue] | None = None,
    num_processes: int | None = None,
    engine: Engine | None = None,
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
        engine: What runs them, in place of `num_processes`; processes of this machine unless given.

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
    require_fresh_seeds(seeds, selection)
    column = Column.plan(
        *(defenses, Path(redteam), selection, seeds, max_gradient_evaluations, options, run_dir)
    )
    if left_out := [name for name in defenses if name not in column.defenses]:
        raise ConfigError(
            f"defenses.{left_out[0]}.min_budget: must not be above max_gradient_evaluations, "
            f"got {max_gradient_evaluations}. Leave the defense out."
        )
    run_fits(column.search, engine, num_processes)
    trials = column.trials()
    settings = {"defenses": defenses, "redteam": redteam, "selection": selection, "seeds": seeds}
    settings |= {"max_gradient_evaluations": max_gradient_evaluations, "options": options}
    comparison = DefenseComparison(
        trials=trials, costs={}, environment=environment(), settings=as_settings(settings)
    )
    comparison.save(run_dir, [])
    chosen = choices(trials)
    if lost := failed_searches(column.searched, chosen):
        raise PatcherError(lost[0])
    warn_of_unusable(selection, trials)
    models = column.models(chosen)
    failed = run_fits([fit for fits in models.values() for fit in fits], engine, num_processes)
    comparison = replace(comparison, costs=costs(models))
    curves = curves_of(models)
    comparison.save(run_dir, curves)
    done = [fit.results for fits in models.values() for fit in fits if fit.is_done]
    overlap = list(dict.fromkeys(entry for found in done for entry in found.overlap))
    _write_report(comparison, curves, overlap, run_dir)
    if failed:
        raise PatcherError(
            f"{len(failed)} runs failed; see {', '.join(str(fit.log) for fit in failed)}. "
            "The same command tries them again."
        )
    return comparison


def _write_report(
    comparison: DefenseComparison, curves: list[Curve], overlap: list[Overlap], run_dir: Path
) -> None:
    console = wide_console(180)
    console.print(rich_table("Search of settings", trial_table(comparison.trials)))
    for trial in comparison.trials:
        if trial.error is not None:
            said = f"{trial.defense}, trial {trial.number}: {trial.error}"
            console.print(said, highlight=False, markup=False, soft_wrap=True)
    if not any(curve.attack_steps for curve in curves):
        return
    results = RunDirectory(run_dir).results
    Results(
        curves=curves,
        environment=comparison.environment,
        settings=comparison.settings,
        overlap=overlap,
    ).save(results)
    write_reports(curves, run_dir, title="Fine-tuning attacks")
    console.print(rich_table("Comparison", defense_table(curves, comparison.costs)))
    console.print("\n".join(comparison_notes(curves)), highlight=False)
    run_report([results], out=run_dir / "report.html", title="Defenses on equal terms")

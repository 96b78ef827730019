"""Options of the `sweep` command: one `fit` per setting and seed, one figure."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from patcher_pl.cli.console import write_reports
from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.jobs import ConfigFile, Engine, OptionValue, RunDirectory, plan_sweep, run_fits
from patcher_pl.reports.environment import environment
from patcher_pl.reports.results import Curve, Results
from patcher_pl.reports.settings import as_settings


def run_sweep(
    base: ConfigFile,
    variants: dict[str, dict[str, OptionValue]],
    run_dir: Path,
    seeds: list[int] | None = None,
    num_processes: int | None = None,
    engine: Engine | None = None,
) -> Results:
    """Runs `fit` for every variant and seed and collects the curves.

    A seed sets the training seed and the red team's. Each run has a directory of its own below
    `run_dir`, with its log; the collected `results.json`, `results.csv`, `asr.png` and `asr.svg` lie
    in `run_dir`; a defense that several variants train is called `defense (variant)` there. Called
    again, it goes on: finished runs are not repeated and interrupted ones resume from their
    checkpoint. A run that fails is reported at the end; the others go on.

    Args:
        base: Configuration of `fit` that all runs share; relative paths start at the sweep's own
            configuration file, or else at the working directory.
        variants: Name of each variant, and the options of `fit` by which it differs.
        run_dir: Where everything goes; created when missing.
        seeds: Seeds of every variant; one run with seed 0 unless given.
        num_processes: Runs at the same time; as many as there are CPUs unless given. CPUs are
            shared out among them.
        engine: What runs them, in place of `num_processes`; processes of this machine unless given.

    Returns:
        What was written to `results.json`.

    Raises:
        ConfigError: If there is no variant.
        PatcherError: If a run failed.
        RunInterrupted: If a signal stopped the sweep; its runs saved checkpoints.
    """
    if not variants:
        raise ConfigError("variants: must name at least one variant, got none.")
    fits = plan_sweep(Path(base), variants, run_dir, seeds or [0])
    failed = run_fits(fits, engine, num_processes)
    # As `plan_sweep` lists them.
    names = [name for name in variants for _ in seeds or [0]]
    done = [(name, fit.results) for name, fit in zip(names, fits, strict=True) if fit.is_done]
    curves = _told_apart([(name, curve) for name, found in done for curve in found.curves])
    results = Results(
        curves=curves,
        overlap=list(dict.fromkeys(entry for _, found in done for entry in found.overlap)),
        environment=environment(),
        settings=as_settings({"base": Path(base), "variants": variants, "seeds": seeds}),
    )
    results.save(RunDirectory(run_dir).results)
    if curves:
        write_reports(curves, run_dir, title="ASR after N attack steps")
    if failed:
        logs = ", ".join(str(fit.log) for fit in failed)
        raise PatcherError(f"{len(failed)} of {len(fits)} runs failed; see {logs}.")
    return results


def _told_apart(found: Sequence[tuple[str, Curve]]) -> list[Curve]:
    """Curves of all variants; those of defenses that several variants train get the variant's name.

    Otherwise reports would take variants for seeds, and average over them.
    """
    owners: dict[tuple[str, int | None], set[str]] = {}
    for variant, curve in found:
        owners.setdefault((curve.defense, curve.k1), set()).add(variant)
    return [
        replace(curve, defense=f"{curve.defense} ({variant})")
        if len(owners[curve.defense, curve.k1]) > 1
        else curve
        for variant, curve in found
    ]

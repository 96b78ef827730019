"""The `sweep` command: one `fit` per setting and seed, each in its own process, one figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patcher_pl.cli.fits import Fit, run_fits
from patcher_pl.cli.redteam import write_reports
from patcher_pl.cli.run_directory import RunDirectory
from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.reports.environment import environment
from patcher_pl.reports.results import Results
from patcher_pl.reports.settings import as_settings

if TYPE_CHECKING:
    ConfigFile = Path
else:
    # Relative to the configuration file that names it, and checked to be readable.
    from jsonargparse.typing import Path_fr as ConfigFile


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
    fits = plan_sweep(Path(base), variants, run_dir, seeds or [0])
    failed = run_fits(fits, num_processes)
    curves = [curve for fit in fits if fit.is_done for curve in fit.results.curves]
    results = Results(
        curves=curves,
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

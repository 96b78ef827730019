"""Models that a red team attacks and that `fit` makes first."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.jobs import Engine, Fit, run_fits
from patcher_pl.redteam.target import Target


def harden(
    targets: Sequence[Target], run_dir: Path, options: Mapping[str, Any], engine: Engine | None
) -> list[str]:
    """Runs `fit` for every target that names one and is not made yet.

    Targets of the same configuration share a run, below `run_dir/hardened`.

    Args:
        targets: What will be attacked.
        run_dir: Directory of the red team's run.
        options: Options of `fit` (dotted names) that differ from the configurations.
        engine: What runs them; `Processes` where it is None.

    Returns:
        Path of every model, in order.

    Raises:
        ConfigError: If a target wants a control that its configuration does not train.
        PatcherError: If a run failed.
        RunInterrupted: If a signal stopped it; runs saved checkpoints.
    """
    fits: dict[Path, Fit] = {}
    for target in targets:
        if target.fit is not None:
            config = Path(target.fit)
            directory = run_dir / "hardened" / config.stem
            known = fits.setdefault(config, Fit.plan(directory, config, options))
            if [fit.path for fit in fits.values()].count(known.path) > 1:
                raise ConfigError(
                    f"models: two configurations are called {config.name}; rename one of them."
                )
    if failed := run_fits(list(fits.values()), engine) if fits else []:
        logs = ", ".join(str(fit.log) for fit in failed)
        raise PatcherError(f"{len(failed)} of {len(fits)} `fit` runs failed; see {logs}.")
    return [_path(target, fits) for target in targets]


def _path(target: Target, fits: Mapping[Path, Fit]) -> str:
    if target.fit is None:
        assert target.path is not None
        return target.path
    made = fits[Path(target.fit)].run_directory
    model = made.control.model if target.control else made.model
    if not model.is_dir():
        raise ConfigError(
            f"models: {target.fit} left no {model}; `control: true` takes a `fit` with a control."
        )
    return str(model)

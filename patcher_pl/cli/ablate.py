"""Options of the `ablate` command: how good must the bi-level gradient be?"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from patcher_pl.ablation import ComparisonGrid, Hardening, Subject, compare_estimators
from patcher_pl.ablation.hardening import hardened, plan_hardening
from patcher_pl.cli.console import wide_console
from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.jobs import (
    ConfigFile,
    Engine,
    Fit,
    OptionValue,
    choose_engine,
    require_one_process,
    run_fits,
)
from patcher_pl.machine import choose_device
from patcher_pl.reports.ablation import Ablation, comparison_table, hardened_table
from patcher_pl.reports.ablation_figures import ablation_figures
from patcher_pl.reports.drawing import save_figure
from patcher_pl.reports.environment import environment
from patcher_pl.reports.settings import as_settings
from patcher_pl.reports.tables import rich_table


def run_ablate(
    base: ConfigFile,
    comparison: ComparisonGrid,
    run_dir: Path,
    hardening: Hardening | None = None,
    trained: dict[str, OptionValue] | None = None,
    model: str | None = None,
    seeds: list[int] | None = None,
    num_processes: int | None = None,
    device: str = "auto",
    engine: Engine | None = None,
) -> Ablation:
    """Compares hypergradient estimators, on one trained model and by the models they harden.

    First a model is trained (`fit` of `base` with the options `trained`), unless `model` names one.
    On it, every estimator is held against the exact hypergradient: angle, error, time, memory, and
    what a small step along it achieves. Then one model is hardened per variant, budget and seed, and
    attacked. Every measurement and every run is a process of its own; called again, the command goes
    on where it was interrupted.

    Writes `ablation.json`, `comparisons.csv`, `hardened.csv`, `tables.md`, figures (`cosine`,
    `trial_step`, `cost`, `memory`, `robustness`, each as PNG and SVG) and `tensorboard/` into
    `run_dir`.

    Args:
        base: Configuration of `fit`, with a `Patcher`, whose model, data and attacker are used;
            relative paths start at the ablation's own configuration file.
        comparison: Estimators and attacks that are compared.
        run_dir: Where everything goes; created when missing.
        hardening: Models to harden; none without it.
        trained: Options of `fit` that make `base` train the model of the comparison.
        model: Hub id or directory of that model; trained unless given.
        seeds: Seeds of batches and of hardened models; 0 unless given.
        num_processes: Processes at the same time; as many as there are CPUs unless given.
        device: Where estimators are compared: `cpu`, `cuda`, ...; `auto` takes a GPU where there is
            one. Hardening goes by `trainer.accelerator` of the base.
        engine: What runs them, in place of `num_processes`; processes of this machine unless given.

    Returns:
        What was written to `ablation.json`.

    Raises:
        ConfigError: If `base` has no `Patcher` with a differentiable attacker.
        PatcherError: If the model could not be trained, or measurements or runs failed.
        RunInterrupted: If a signal stopped it; nothing finished is lost.
    """
    seeds = seeds or [0]
    engine = choose_engine(engine, num_processes)
    require_one_process(engine, "estimates of hypergradients")
    place = choose_device(device)
    path = model or str(_train(Path(base), trained or {}, run_dir / "trained", engine))
    comparisons = compare_estimators(
        comparison,
        _subject(Path(base), path),
        seeds,
        run_dir / "comparisons",
        engine=engine,
        device=str(place),
    )
    settings = {"base": Path(base), "trained": trained, "model": model, "seeds": seeds}
    settings |= {"comparison": comparison, "hardening": hardening}
    ablation = Ablation(
        comparisons=comparisons,
        hardened=[],
        environment=environment(),
        settings=as_settings(settings),
    )
    _write(ablation, run_dir)
    failed = [
        f"{row.estimator}, K = {row.num_steps}: {row.error}" for row in comparisons if row.error
    ]
    if hardening is not None:
        fits = plan_hardening(Path(base), hardening, seeds, run_dir / "hardened")
        failed += [f"see {fit.log}" for fit in run_fits(list(fits.values()), engine)]
        ablation = replace(ablation, hardened=hardened(fits))
        _write(ablation, run_dir)
    _show(ablation, run_dir)

    if failed:
        raise PatcherError(
            f"{len(failed)} measurements failed; the first: {failed[0]}. "
            "The same command tries them again."
        )
    return ablation


def _write(ablation: Ablation, run_dir: Path) -> None:
    """Writes everything that is known so far."""
    from patcher_pl.ablation.tensorboard import write_tensorboard

    ablation.save(run_dir)
    for name, figure in ablation_figures(ablation).items():
        save_figure(figure, run_dir / f"{name}.png")
        save_figure(figure, run_dir / f"{name}.svg")
    write_tensorboard(ablation, run_dir / "tensorboard")


def _show(ablation: Ablation, run_dir: Path) -> None:
    """Prints the tables."""
    console = wide_console(160)
    compared = comparison_table(ablation.comparisons)
    console.print(rich_table("Estimators, mean over seeds", compared, num_names=2))
    if ablation.hardened:
        console.print(
            rich_table(
                "Hardened models, over seeds", hardened_table(ablation.hardened), num_names=2
            )
        )
    console.print(f"Written to {run_dir}", highlight=False, soft_wrap=True)


def _train(base: Path, options: Mapping[str, Any], directory: Path, engine: Engine) -> Path:
    """Trains the model of the comparison, unless it is there already."""
    fit = Fit.plan(directory, base, options)
    if run_fits([fit], engine):
        raise PatcherError(f"The model to compare on could not be trained; see {fit.log}.")
    return fit.run_directory.model


def _subject(base: Path, model: str) -> Subject:
    """The bi-level problem of the base configuration, with another model."""
    from patcher_pl.attackers import FineTuningAttacker
    from patcher_pl.cli.errors import readable_config_errors
    from patcher_pl.cli.lightning_cli import PatcherCLI

    with readable_config_errors():
        cli = PatcherCLI("fit", ["--config", str(base), "--run_dir", "unused"])
    defense, data = cli.model, cli.datamodule
    source = defense.attack_source
    attacker = None if source is None else source.attacker
    if not isinstance(attacker, FineTuningAttacker):
        raise ConfigError(
            f"base: {base} must train a Patcher against a FineTuningAttacker, got "
            f"{type(defense).__name__}. Give its configuration, such as configs/testbed/patcher.yaml."
        )
    if not attacker.is_differentiable or data.attack is None:
        raise ConfigError(
            f"base: {base} must attack all weights (no `attacker.lora`, `carry` or `optimizer_restart_every`, `trains: all`) "
            "with AdamW or SGD, and have `data.attack`."
        )
    batch_size, attack_batch_size = data.batch_sizes
    return Subject(
        language_model=replace(defense.language_model, path=model),
        attacker=attacker,
        safe=data.safe,
        attack=data.attack,
        batch_size=batch_size,
        attack_batch_size=attack_batch_size,
    )

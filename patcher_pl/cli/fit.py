"""`fit`, `validate` and `test`, and what `fit` does once a model is trained: export, attack, control."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from patcher_pl.callbacks import GracefulStop, RunRecord
from patcher_pl.callbacks.robustness_probe import log_robustness, robustness_scalars
from patcher_pl.callbacks.run_checkpoint import find_last
from patcher_pl.cli.attackers_beside import attackers_beside
from patcher_pl.cli.console import write_reports
from patcher_pl.cli.errors import readable_config_errors
from patcher_pl.cli.lightning_cli import PatcherCLI
from patcher_pl.cli.sizes import tell_sizes
from patcher_pl.contents import model_digest
from patcher_pl.data.overlap import Known, overlaps
from patcher_pl.defenses import Defense
from patcher_pl.defenses.strategies import replicates, shards, uses_fsdp1
from patcher_pl.errors import PatcherError, RunInterrupted
from patcher_pl.files import write_text
from patcher_pl.jobs import InProcess, RunDirectory
from patcher_pl.jobs.lock import held
from patcher_pl.machine import cpu_threads
from patcher_pl.models import export_model
from patcher_pl.models.other_release import start_of
from patcher_pl.models.peers import is_shared, is_spread
from patcher_pl.models.sharding import gathered, on_first_process
from patcher_pl.redteam.board import Board, require_verdicts
from patcher_pl.redteam.grid import ModelName
from patcher_pl.redteam.job import AttackedModel, Bench
from patcher_pl.redteam.room import require_room
from patcher_pl.redteam.together import Together, follow, leading
from patcher_pl.reports.model_card import model_card
from patcher_pl.reports.results import Curve, Overlap, Results
from patcher_pl.reports.settings import as_settings, fingerprint


def run_lightning(command: str, arguments: Sequence[str]) -> None:
    """Runs `fit`, `validate` or `test`.

    Raises:
        ConfigError: If the configuration cannot be run.
        RunInterrupted: If a signal stopped the run; a checkpoint was saved.
    """
    with readable_config_errors():
        cli = PatcherCLI(command, arguments)
    options = cli.options
    with cpu_threads(options.num_threads):
        if command == "fit":
            _fit(cli)
            return
        run = getattr(cli.trainer, command)
        run(cli.model, datamodule=cli.datamodule, ckpt_path=options.ckpt_path, weights_only=True)


def _fit(cli: PatcherCLI) -> None:
    # One process of a distributed run holds the directory for all of them.
    writes = cli.trainer.is_global_zero and not cli.options.trainer.fast_dev_run
    with held(cli.options.run_dir) if writes else nullcontext():
        _fit_alone(cli)


def _fit_alone(cli: PatcherCLI) -> None:
    options = cli.options
    run_directory = RunDirectory(options.run_dir)
    rehearsal, first = bool(options.trainer.fast_dev_run), cli.trainer.is_global_zero
    if not rehearsal:
        cli.record.settings = cli.run_settings(with_contents=first)
    if (control := cli.control) is not None:
        control.require_valid(cli.model)
        if not rehearsal:
            run = cli.record.settings
            cli.control_record.settings = control.settings(run, with_contents=first)
    if options.redteam is not None:
        require_room(options.redteam, cli.model.language_model)
    overlap = _shared_data(cli) if first else []
    if not rehearsal and first:
        if options.ckpt_path is not None:
            _compare(cli.record, Path(options.ckpt_path))
            if control is not None and (begun := _last_of(run_directory.control)) is not None:
                _compare(cli.control_record, begun)
        run_directory.claim(resume=cli.may_go_on, overwrite=options.overwrite)
        cli.save_config(run_directory.config)
        cli.memory = tell_sizes(cli)
    try:
        with attackers_beside(cli, run_directory):
            fit_or_stop(cli.trainer, cli.model, cli.datamodule, options.ckpt_path, run_directory)
    except PatcherError:
        began = cli.trainer.global_step > 0 or run_directory.checkpoints.exists()
        if first and not (began or rehearsal or cli.may_go_on):
            run_directory.clear()  # Once mended, the same command may begin the run.
        raise
    if not rehearsal:
        finish_fit(cli, overlap)


def _shared_data(cli: PatcherCLI) -> list[Overlap]:
    """What the data of a run has in common, before it costs anything."""
    data, redteam = cli.datamodule, cli.options.redteam
    training = {"defender": data.safe}
    if data.attack is not None:
        training["simulated attacker"] = data.attack
    if redteam is not None:
        return redteam.shared_data(training)
    return overlaps({name: Known.of(mixture.rows()) for name, mixture in training.items()})


def _compare(record: RunRecord, checkpoint: Path) -> None:
    """Says which settings differ from those that the checkpoint was written with."""
    found = record.compare(checkpoint)
    if found is None:
        print(
            f"{checkpoint} does not say with which settings it was written (an earlier version did "
            "not): nothing was compared; optimizer and schedule go on with its settings."
        )
    elif found:
        print(f"Going on from {checkpoint}; settings that differ from its own, taken from here on:")
        print("\n".join(f"  {change}" for change in found))


def fit_or_stop(
    trainer: Trainer,
    model: Any,
    data: Any,
    ckpt_path: Path | str | None,
    run_directory: RunDirectory,
) -> None:
    """Trains; a signal ends in `RunInterrupted` that says how to go on."""
    try:
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except RunInterrupted as stop:
        stops = [callback for callback in trainer.callbacks if isinstance(callback, GracefulStop)]  # type: ignore[attr-defined]
        number = next(callback.signal for callback in stops if callback.signal is not None)
        raise RunInterrupted(
            f"stopped by {number.name} after step {trainer.global_step}; everything up to there is "
            f"saved in {run_directory.checkpoints}. Go on with the same command and --ckpt_path last.",
            signal=number,
        ) from stop


@dataclass(frozen=True)
class _Trained:
    """A trained model, exported already.

    Args:
        defense: What trained it.
        model: The plain model.
        run_directory: Where its files are.
        logger: Where its curves go.
    """

    defense: Defense
    model: Any
    run_directory: RunDirectory
    logger: Any


def finish_fit(cli: PatcherCLI, overlap: Sequence[Overlap] = ()) -> None:
    """Exports and attacks the trained model and, where asked for, an SFT control of equal cost.

    The red team's cells go below `cells/`, as those of `redteam` do: what is there already, from an
    interrupted run that trained the same weights, is not measured again. All processes of a sharded
    run attack together. With FSDP1 the control is trained first: then the first process attacks
    alone, and the others are done.

    Args:
        cli: The run.
        overlap: What its data sets have in common, for the results.

    Raises:
        RunInterrupted: If a signal stopped an attack.
        PatcherError: If nothing that an attack measured was scored.
    """
    run_directory = RunDirectory(cli.options.run_dir)
    defense: Any = cli.model
    examination = _Examination(cli, run_directory, defense, overlap)
    models: Iterable[_Trained] = _trained_models(cli, defense, run_directory)
    if uses_fsdp1(cli.trainer):
        models = list(models)
        torch.distributed.destroy_process_group()
        if not cli.trainer.is_global_zero:
            return
    for trained in models:
        examination.examine(trained)
        del trained  # Room for the next one.
    if not cli.trainer.is_global_zero:
        return
    results = examination.board.save()
    curves = results.curves
    if curves:
        examination.write_cards(results)
        write_reports(curves, run_directory.root, title="Fine-tuning attacks")
        require_verdicts(curves, "the same command with --ckpt_path last")
    else:
        print(f"Written to {run_directory.root}")


def _trained_models(
    cli: PatcherCLI, defense: Defense, run_directory: RunDirectory
) -> Iterator[_Trained]:
    if cli.trainer.is_global_zero:
        print(f"Trained {defense.name}: {defense.cost.gradient_evaluations} gradient evaluations.")
    yield _exported(cli.trainer, defense, run_directory)
    if cli.control is not None:
        control, trainer = train_control(cli, defense, run_directory.control)
        yield _exported(trainer, control, run_directory.control)


def _exported(trainer: Trainer, defense: Any, run_directory: RunDirectory) -> _Trained:
    """Writes a model as a plain Hugging Face directory; what only training needs goes then."""
    model: Any = defense.model
    if not uses_fsdp1(trainer):
        _extrapolate(defense, model)
    if replicates(trainer):
        on_first_process(lambda: export_model(model, defense.tokenizer, run_directory.model))
        return _Trained(defense, model, run_directory, trainer.logger)
    if not shards(trainer):
        export_model(model, defense.tokenizer, run_directory.model)
        return _Trained(defense, model, run_directory, trainer.logger)
    whole: Any = gathered(model)
    if uses_fsdp1(trainer) and trainer.is_global_zero:
        _extrapolate(defense, whole)
    on_first_process(lambda: export_model(whole, defense.tokenizer, run_directory.model))
    defense.release()
    trainer.strategy.optimizers, trainer.strategy.lr_scheduler_configs = [], []
    # FSDP1's shards cannot be attacked.
    attacked = whole if uses_fsdp1(trainer) else model
    return _Trained(defense, attacked, run_directory, trainer.logger)


def _extrapolate(defense: Defense, model: Any) -> None:
    if defense.extrapolation is not None:
        defense.extrapolation.apply(model, defense.language_model)


def train_control(
    cli: PatcherCLI, defense: Defense, run_directory: RunDirectory
) -> tuple[Defense, Trainer]:
    """Trains SFT from the same start, seed and data, with as many gradient evaluations.

    Goes on from its own checkpoint where there is one.

    Returns:
        The trained control and its trainer.
    """
    assert cli.control is not None
    control = cli.control.build(defense)
    num_steps = defense.cost.gradient_evaluations // control.accumulate_grad_batches
    fresh = cli.fresh_parts()
    trainer = cli.build_trainer(
        run_directory,
        name="sft-control",
        is_main=False,
        max_steps=num_steps,
        max_epochs=-1,
        strategy=fresh.trainer.strategy,
    )
    seed = cli.options.seed_everything
    if not isinstance(seed, bool):
        seed_everything(seed, verbose=False)
    if trainer.is_global_zero:
        own = ", ".join(f"{name} = {value}" for name, value in cli.control.options.items())
        print(
            f"Training the SFT control: {num_steps} steps"
            + (f", with settings of its own: {own}." if own else ".")
        )
    fit_or_stop(trainer, control, fresh.data, _last_of(run_directory), run_directory)
    return control, trainer


def _last_of(run_directory: RunDirectory) -> Path | None:
    """The newest checkpoint; None where training has not left any."""
    checkpoints = run_directory.checkpoints
    begun = checkpoints.is_dir() and any(checkpoints.iterdir())
    return find_last(checkpoints) if begun else None


class _Examination:
    """Attacks the models of a run, and logs how they fared."""

    def __init__(
        self,
        cli: PatcherCLI,
        run_directory: RunDirectory,
        defense: Defense,
        overlap: Sequence[Overlap],
    ) -> None:
        options = cli.options
        spent = {
            "num_steps": cli.trainer.global_step,
            "gradient_evaluations": defense.cost.gradient_evaluations,
        }
        history = cli.record.history
        changed: dict[str, Any] = {"changed_on_the_way": history} if history else {}
        if cli.control is not None and cli.control.options:
            own_history = cli.control_record.history
            changed["control"] = {
                "settings_of_its_own": cli.control.options,
                **({"changed_on_the_way": own_history} if own_history else {}),
            }
        self._cli = cli
        self._attacked: list[tuple[list[Curve], RunDirectory, str | None]] = []
        self.board = Board(
            run_directory=run_directory,
            engine=Together() if is_shared(defense.model) else InProcess(),
            device=str(cli.trainer.strategy.root_device),
            num_threads=options.num_threads,
            settings=as_settings(
                {
                    "redteam": options.redteam,
                    **spent,
                    **changed,
                    # What of the defender's weights its first steps have moved.
                    "weights_moved": defense.step_check.share,
                }
            ),
            overlap=overlap,
            training_data=cli.datamodule.shares,
            memory=cli.memory,
        )

    def examine(self, trained: _Trained) -> None:
        redteam = self._cli.options.redteam
        if redteam is None:
            return
        defense, logger = trained.defense, trained.logger
        seed = self._cli.options.seed_everything
        shared, is_plain = is_shared(trained.model), not is_spread(trained.model)
        # Lightning has left a plain one in host memory; shards are where they were.
        model = trained.model.to(self.board.device) if is_plain else trained.model
        bench = Bench(model, defense.tokenizer)
        if shared and torch.distributed.get_rank() > 0:
            follow(bench, self.board.device)
            if is_plain:
                model.cpu()
            return
        attacked = AttackedModel(
            name=ModelName(
                defense.name,
                defense.num_attack_steps,
                None if isinstance(seed, bool) else seed,
            ),
            language_model=defense.language_model,
            weights=model_digest(str(trained.run_directory.model)),
            bench=bench,
            sibling=start_of(defense.language_model),
        )
        try:
            with leading() if shared else nullcontext():
                curves = self.board.attack(redteam, [attacked])
        except RunInterrupted as stop:
            how = f"{str(stop).removesuffix('.')} and --ckpt_path last."
            raise RunInterrupted(how, signal=stop.signal) from stop
        if shared:
            bench.clear()
        if is_plain:
            model.cpu()  # Room for the next one on the device.
        curves = [curve for curve in curves if curve.attack_steps]  # The others failed at once.
        self._attacked.append((curves, trained.run_directory, attacked.weights))
        if curves and isinstance(logger, TensorBoardLogger):
            step = defense.trainer.global_step
            log_robustness(logger, curves, step)
            final = {f"final/{key}": value for key, value in robustness_scalars(curves[0]).items()}
            logger.log_hyperparams(self._hyperparameters(defense), final)
            logger.finalize("success")

    def write_cards(self, results: Results) -> None:
        """Says in the exported directories how the models fared."""
        training = fingerprint(self._cli.record.settings)
        for curves, directory, weights in self._attacked:
            if curves:
                card = model_card(
                    curves, results, name=directory.root.name, weights=weights, training=training
                )
                write_text(directory.model / "README.md", card)

    def _hyperparameters(self, defense: Defense) -> dict[str, Any]:
        """The configured numbers that tell runs apart in TensorBoard's table."""
        config = self._cli.config[self._cli.command]
        chosen = {"defense": defense.name, "seed": config.seed_everything}
        if defense is self._cli.model:
            flat = dict(config.model.init_args.items(branches=False))
        else:
            assert self._cli.control is not None
            flat = {
                name.removeprefix("model.init_args."): value
                for name, value in self._cli.control.own_settings(with_contents=False).items()
            }
        return chosen | {
            key.replace("init_args.", ""): value
            for key, value in flat.items()
            if isinstance(value, int | float | str | bool) and not key.endswith("class_path")
        }

"""LightningCLI with a fixed layout of the run's directory."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import yaml
from lightning import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from patcher_pl.callbacks import (
    AtomicCheckpointIO,
    ComputeBudget,
    ConcurrencyMonitor,
    CostMonitor,
    GracefulStop,
    Progress,
    ProgressLog,
    RobustnessProbe,
    RunCheckpoint,
    RunRecord,
)
from patcher_pl.callbacks.checkpoint_files import is_whole
from patcher_pl.callbacks.run_checkpoint import find_last
from patcher_pl.cli.control import Control
from patcher_pl.cli.given_files import require_single_keys, with_found_files
from patcher_pl.cli.program import program
from patcher_pl.data import SafetyDataModule
from patcher_pl.defenses import Defense
from patcher_pl.defenses.strategies import require_supported, shards, uses_fsdp1
from patcher_pl.errors import CheckpointError, ConfigError
from patcher_pl.files import write_text
from patcher_pl.jobs.fit import OptionValue
from patcher_pl.jobs.resuming import flat_settings
from patcher_pl.jobs.run_directory import RunDirectory
from patcher_pl.launcher import num_processes
from patcher_pl.planning import Run
from patcher_pl.redteam import RedTeam


class PatcherCLI(LightningCLI):
    """One Lightning command, parsed but not yet run.

    Args:
        command: `fit`, `validate` or `test`; only its options are registered, which saves seconds.
        arguments: Command line after the command.
    """

    spoken_of: ClassVar[str | None] = None
    """What the help text calls the command, if not by its name."""

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        self.command = command
        self.may_go_on = False  # Whether an earlier run may be in `run_dir`.
        self.record, self.control_record = RunRecord(), RunRecord()
        self.control: Control | None = None
        self.memory: dict[
            str, Any
        ] = {}  # What the run holds, as far as it was told before it began.
        quiet = {"exit_on_error": False}
        super().__init__(
            model_class=Defense,
            datamodule_class=SafetyDataModule,
            subclass_mode_model=True,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={"use_distributed_sampler": False, "devices": 1},
            parser_kwargs={**quiet, command: quiet},
            args=[command, *arguments],
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the chosen command."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Lets the help text say how the program was called."""
        super().setup_parser(*args, **kwargs)
        self._parser(self.command).prog = f"{program()} {self.spoken_of or self.command}"

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses without LightningCLI's warning that `args` were given."""
        args = with_found_files(args)
        require_single_keys(args)
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        # Checkpoints hold no hyperparameters to take over; the trainer reads them, and says why not.
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        # Parsing and building report configuration errors; running is done by `run_lightning`.
        pass

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what a run needs beside trainer, model and data.

        Every command takes the options of `fit`, so that the configuration of a run fits them all.
        """
        parser.add_argument(
            "--run_dir",
            type=Path,
            required=self.command == "fit",
            help="Where everything of the run goes.",
        )
        parser.add_argument(
            "--num_threads",
            type=int | None,
            default=None,
            help="CPU threads of torch; null leaves it to torch. Tiny models want 1.",
        )
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Delete an earlier run in run_dir first."
        )
        parser.add_argument(
            "--redteam",
            type=RedTeam | None,
            default=None,
            sub_configs=True,
            help="Attacks on the trained model; none without it.",
        )
        parser.add_argument(
            "--probe_every_n_steps",
            type=int | None,
            default=None,
            help="Run the red team on a copy of the model every so many steps.",
        )
        parser.add_argument(
            "--control",
            type=bool | dict[str, OptionValue],
            default=False,
            help="Also train and attack plain SFT with as many gradient evaluations; options of "
            "`fit` (dotted names below model.init_args, and values) hold for it alone.",
        )
        parser.add_argument(
            "--checkpoint_every_n_steps",
            type=int,
            default=1000,
            help="Steps between checkpoints to resume from.",
        )
        parser.add_argument(
            "--checkpoint_in_background",
            type=bool,
            default=False,
            help="Write them while training goes on, from a copy in host memory.",
        )
        parser.add_argument(
            "--max_gradient_evaluations",
            type=int | None,
            default=None,
            help="End training once it has cost this much, attacks included.",
        )

    @property
    def options(self) -> Any:
        """The built objects and plain values of the command."""
        return self.config_init[self.command]

    def before_instantiate_classes(self) -> None:
        """Checks what must hold before anything is built, and resolves `--ckpt_path last`."""
        config = self.config[self.command]
        for option, instead, unset in (
            ("gradient_clip_val", "max_grad_norm", None),
            ("accumulate_grad_batches", "accumulate_grad_batches", 1),
        ):
            if config.trainer[option] not in (None, unset):
                raise ConfigError(
                    f"trainer.{option}: defenses optimize by hand, so Lightning cannot do this for "
                    f"them (got {config.trainer[option]}). Set model.init_args.{instead} instead."
                )
        if config.control not in (None, False):
            options = {} if config.control is True else config.control
            self.control = Control(options, config.model)
        config.weights_only = True
        if config.ckpt_path in ("last", "auto"):
            if config.run_dir is None:
                raise ConfigError(
                    f"--ckpt_path {config.ckpt_path} needs --run_dir, to know whose checkpoint."
                )
            self.may_go_on = True
            checkpoints = RunDirectory(config.run_dir).checkpoints
            begins = config.ckpt_path == "auto" and not any(checkpoints.glob("step-*.ckpt"))
            config.ckpt_path = None if begins else str(find_last(checkpoints))
        elif config.ckpt_path is not None:
            self.may_go_on = True
            if not Path(config.ckpt_path).exists():
                raise CheckpointError(f"--ckpt_path: there is no {config.ckpt_path}.")
            if not is_whole(Path(config.ckpt_path)):
                raise CheckpointError(
                    f"--ckpt_path: {config.ckpt_path} is torn or no checkpoint. Give another one, "
                    "or `last` for the newest that is whole."
                )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Builds the trainer of the main run; others come from `build_trainer`."""
        if self.command != "fit":
            plugins = [AtomicCheckpointIO()]
            return self._supported(
                super().instantiate_trainer(logger=False, plugins=plugins, **kwargs)
            )
        run_directory = RunDirectory(self.options.run_dir)
        return self.build_trainer(run_directory, name=self.model.name, is_main=True, **kwargs)

    def build_trainer(
        self, run_directory: RunDirectory, name: str, is_main: bool, **kwargs: Any
    ) -> Trainer:
        """Builds a trainer whose checkpoints and TensorBoard lines go where they belong.

        Args:
            run_directory: Gets the checkpoints.
            name: Name of the run in TensorBoard.
            is_main: Whether the run's probes, budget and record are for this trainer; the control
                has neither of the first two, and a record of its own.
            kwargs: Arguments of `lightning.Trainer` that differ from the configuration.
        """
        options = self.options
        trainer_config = {**options.trainer, **kwargs}
        checkpoint = RunCheckpoint(
            run_directory.checkpoints,
            options.checkpoint_every_n_steps,
            in_background=options.checkpoint_in_background,
        )
        callbacks = [*(trainer_config.get("callbacks") or []), CostMonitor(), ConcurrencyMonitor()]
        callbacks.append(ProgressLog())
        if is_main and options.max_gradient_evaluations is not None:
            callbacks.append(ComputeBudget(options.max_gradient_evaluations))
        if is_main and options.probe_every_n_steps is not None:
            if options.redteam is None:
                raise ConfigError(
                    "probe_every_n_steps needs `redteam`, to know what to probe with."
                )
            callbacks.append(RobustnessProbe(options.redteam, options.probe_every_n_steps))
        if not trainer_config["fast_dev_run"]:
            record = self.record if is_main else self.control_record
            callbacks += [record, checkpoint, GracefulStop(checkpoint)]
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if trainer_config["enable_progress_bar"] is not False and not has_bar:
            callbacks.append(Progress())
        trainer_config["callbacks"] = callbacks
        if trainer_config["logger"] in (None, True):
            root = RunDirectory(options.run_dir).tensorboard
            trainer_config["logger"] = TensorBoardLogger(
                root.parent, name=root.name, version=name, default_hp_metric=False
            )
        plugins = trainer_config["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        trainer_config["plugins"] = [*plugins, AtomicCheckpointIO()]
        trainer_config["default_root_dir"] = options.run_dir
        return self._supported(Trainer(**trainer_config))

    def _supported(self, trainer: Trainer) -> Trainer:
        _require_as_many_processes(trainer)
        require_supported(self.model, trainer)
        if shards(trainer):
            probes = any(isinstance(callback, RobustnessProbe) for callback in trainer.callbacks)  # type: ignore[attr-defined]
            if probes and uses_fsdp1(trainer):
                raise ConfigError(
                    "probe_every_n_steps: probes cannot attack what FSDPStrategy (FSDP1) shards. Use "
                    "null, or ModelParallelStrategy (FSDP2); the red team attacks the finished model."
                )
            # Weights that were gathered in inference mode could not be trained afterwards.
            trainer.validate_loop.inference_mode = False
            trainer.fit_loop.epoch_loop.val_loop.inference_mode = False
        return trainer

    def fresh_parts(self) -> Any:
        """Builds data and trainer options of the run once more, from the beginning."""
        return self.parser.instantiate(self.config)[self.command]

    @property
    def planned_run(self) -> Run:
        """The run as configured, its defense built without weights."""
        config = self.config.clone()
        given = config[self.command]
        has_red_team, given.redteam = given.redteam is not None, None
        built = self.parser.instantiate(config)[self.command]
        return Run(
            defense=built.model,
            trainer=built.trainer,
            batch_size=given.data.batch_size,
            attack_batch_size=given.data.attack_batch_size or given.data.batch_size,
            folders=[Path(path.absolute).parent for path in given.config or []],
            has_control=given.control not in (None, False),
            has_red_team=has_red_team,
            max_gradient_evaluations=given.max_gradient_evaluations,
        )

    def save_config(self, path: Path) -> None:
        """Writes the complete configuration, from which the run can be repeated.

        How this call began, afresh or from a checkpoint, is no part of it: repeating the run must
        neither delete an earlier one nor look for a checkpoint that is gone by then.
        """
        write_text(path, self._repeatable)

    def run_settings(self, *, with_contents: bool) -> dict[str, Any]:
        """What `save_config` writes, by dotted names, see `flat_settings`."""
        return flat_settings(yaml.safe_load(self._repeatable), with_contents=with_contents)

    @cached_property
    def _repeatable(self) -> str:
        config = self.config[self.command].clone()
        config.overwrite, config.ckpt_path = False, None
        return self._parser(self.command).dump(config, skip_unset=False)


def _require_as_many_processes(trainer: Trainer) -> None:
    """Refuses processes that would each run on their own, or for which others would be waited."""
    devices, started = trainer.num_devices * trainer.num_nodes, num_processes()
    if devices != started and (started > 1 or trainer.world_size != devices):
        raise ConfigError(
            f"trainer.devices: must be the number of processes that the launcher has started, {started}, "
            f"divided by trainer.num_nodes, got {trainer.num_devices} on {trainer.num_nodes}. Change it, "
            "with a strategy that shards as in configs/strategies, or start as many processes "
            "(`torchrun --nproc-per-node`, `srun --ntasks-per-node`, `SlurmArray.tasks_per_node`)."
        )

"""The `attacker` command: one simulated attacker as a process of its own."""

import argparse
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from patcher_pl.cli.program import program
from patcher_pl.errors import ConfigError, RunInterrupted
from patcher_pl.private_directory import remove_private
from patcher_pl.supervision import end_with_parent


def run_attacker(arguments: Sequence[str]) -> None:
    """Attacks what a defender with the same configuration publishes, until it has finished.

    Raises:
        ConfigError: If the configuration has no such attacker, or cannot be run.
        PatcherError: If nothing was published for `--idle_timeout_s`.
        RunInterrupted: If a signal stopped it.
    """
    parser = _parser()
    own, of_fit = parser.parse_known_args(list(arguments))
    if own.help:
        print(parser.format_help())
        return
    if own.supervised:
        # At once: the imports below take seconds, in which the parent may be gone already.
        end_with_parent(lambda: remove_private(own.mailbox) if own.mailbox else None)
    from patcher_pl.cli.console import log_progress
    from patcher_pl.quiet import quiet_libraries

    log_progress()
    quiet_libraries()
    _attack(own, of_fit)


def _attack(own: argparse.Namespace, of_fit: list[str]) -> None:
    from lightning import Trainer

    from patcher_pl.cli.errors import readable_config_errors
    from patcher_pl.cli.lightning_cli import PatcherCLI
    from patcher_pl.defenses.attack_source import Concurrent
    from patcher_pl.defenses.attacker_module import AttackerModule
    from patcher_pl.machine import cpu_threads
    from patcher_pl.mailbox import Mailbox

    class AttackerCLI(PatcherCLI):
        """`fit`, with a trainer that leaves nothing behind."""

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            settings = {**self.options.trainer, **_WITHOUT_TRACES, **kwargs}
            source = self.model.attack_source
            devices = source.settings.devices if isinstance(source, Concurrent) else None
            if devices is not None and own.member < len(devices):
                settings |= _placed(devices[own.member])
            return Trainer(**settings)

    with readable_config_errors():
        cli = AttackerCLI("fit", of_fit)
    source = cli.model.attack_source
    if not isinstance(source, Concurrent):
        attacker = None if source is None else source.attacker
        raise ConfigError(
            "model.init_args.attacker: this command runs a ConcurrentAttacker, got "
            f"{type(attacker).__name__}. Use `fit`, which attacks by itself."
        )
    attacker = source.settings
    if not 0 <= own.member < len(attacker.population):
        raise ConfigError(
            f"--member must be in 0..{len(attacker.population) - 1}, got {own.member}."
        )
    root = own.mailbox or attacker.mailbox
    if root is None:
        raise ConfigError("--mailbox: name the directory that the defender's `mailbox` names.")
    mailbox = Mailbox(root, len(attacker.population))
    if not own.supervised:
        mailbox.create()
    module = AttackerModule(
        cli.model,
        cli.datamodule,
        attacker,
        index=own.member,
        mailbox=mailbox,
        check=_flag_on_signals(),
        idle_timeout_s=own.idle_timeout_s,
    )
    with cpu_threads(cli.options.num_threads):
        cli.trainer.fit(module)


_WITHOUT_TRACES: dict[str, Any] = {
    "callbacks": [],
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "fast_dev_run": False,
    "limit_train_batches": None,
    "limit_val_batches": 0,
    "max_epochs": -1,
    "max_steps": -1,
    "max_time": None,
    "num_sanity_val_steps": 0,
    "profiler": None,
}


def _placed(device: str) -> dict[str, Any]:
    """Settings of a trainer on a device such as `cuda:1`."""
    kind, _, index = device.partition(":")
    return {"accelerator": kind, "devices": [int(index)] if index else 1}


def _flag_on_signals() -> Any:
    """Returns a check that raises once SIGINT or SIGTERM has come; a second one ends at once."""
    received: list[int] = []

    def on_signal(number: int, _: FrameType | None) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    def check() -> None:
        if received:
            raise RunInterrupted(
                "stopped; started again with the same command, it repeats the attack under way.",
                signal=received[0],
            )

    return check


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{program()} attacker",
        description="Attacks what `fit` with the same configuration publishes in a mailbox.",
        epilog="Takes every option of `fit` as well (`--config`, `--run_dir`, `--num_threads`, ...).",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this and end")
    parser.add_argument(
        "--member", type=int, default=0, help="which attacker of the population, from 0"
    )
    parser.add_argument(
        "--mailbox",
        type=Path,
        help="directory that is shared with the defender, if not the config's",
    )
    parser.add_argument(
        "--idle_timeout_s",
        type=float,
        help="seconds without anything to attack that end it with an error; for ever unless given",
    )
    parser.add_argument(
        "--supervised",
        action="store_true",
        help="end when standard input does; for attackers that `fit` starts",
    )
    return parser

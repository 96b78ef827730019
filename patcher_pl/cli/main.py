"""Chooses the command, and turns errors that a user can act on into one readable message."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patcher_pl import __version__
from patcher_pl.cli.program import program
from patcher_pl.errors import ConfigError, PatcherError, RunInterrupted
from patcher_pl.launcher import num_processes, rank
from patcher_pl.supervision import SUPERVISED, end_with_parent

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# Commands in the order of the help text; each is imported when it is chosen.
COMMANDS = {
    "init": "write configurations that harden and attack a model of your own, with data of your own",
    "fit": "harden a model, export it, and attack it to see whether it holds",
    "plan": "memory, work and time that `fit` will need, and which GPUs it fits; trains nothing",
    "validate": "loss of a model on the validation data",
    "test": "loss of a model on the validation data, logged as test",
    "redteam": "attack any model and measure when its safety breaks",
    "attacker": "run the simulated attacker of a concurrent `fit` as a job of its own",
    "sweep": "run `fit` for several settings and seeds, and draw them in one figure",
    "compare": "train defenses at equal budgets after equal searches, and attack all alike",
    "scale": "make the comparison at several budgets: steps to break against training compute",
    "report": "one HTML page, and tables for papers, from the results of one or several runs",
    "ablate": "compare hypergradient estimators, on one model and by the models they harden",
    "parity": "compare the answers of two generation back ends, token by token",
    "testbed": "write the built-in testbed (model, tokenizer, data) into a folder",
}
# Commands whose options are the parameters of a function.
_FUNCTIONS = {
    "redteam": "patcher_pl.cli.redteam.run_redteam",
    "sweep": "patcher_pl.cli.sweep.run_sweep",
    "compare": "patcher_pl.cli.compare.run_compare",
    "scale": "patcher_pl.cli.scale.run_scale",
    "ablate": "patcher_pl.cli.ablate.run_ablate",
    "parity": "patcher_pl.cli.parity.run_parity",
    "testbed": "patcher_pl.worlds.command.run_testbed",
}
TRACEBACK = "PATCHER_PL_TRACEBACK"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Command line without the program's name; None takes the process's.

    Returns:
        Exit status: 0, 1 for a failed run, 2 for a wrong command line or configuration, 128 + n
        where signal n stopped the run.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if os.environ.pop(SUPERVISED, None):  # Not for this process's own children.
        end_with_parent(lambda: None)
    command = _parser().parse_args(given[:1]).command
    try:
        _run(command, given[1:])
    except RunInterrupted as stop:
        print(f"patcher_pl {command}: {stop}", file=sys.stderr)
        return 128 + stop.signal
    except PatcherError as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"patcher_pl {command}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"patcher_pl {command}: error: {error}. What was written is whole.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"patcher_pl {command}: interrupted.", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program(),
        description="Hardens open-weight language models against malicious fine-tuning.",
        epilog=f"`COMMAND --help` lists a command's options. {TRACEBACK}=1 shows stack traces.",
    )
    parser.add_argument("--version", action="version", version=f"patcher_pl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, purpose in COMMANDS.items():
        commands.add_parser(name, help=purpose, add_help=False)
    return parser


def run() -> None:
    """`main` as a program of its own, and the end of the process."""
    status = main()
    if status == 0 and sys.argv[1] == "redteam" and num_processes() > 1:
        # All is written. Now and then a thread of the processes' group that is still there
        # aborts the interpreter on its way down, and the launcher takes that for a failure.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    sys.exit(status)


def _run(command: str, arguments: list[str]) -> None:
    if command == "attacker":
        # Before anything is imported that takes seconds: it may have to end at once.
        from patcher_pl.cli.attacker import run_attacker

        run_attacker(arguments)
        return
    if command == "report":
        # Reads files that are there: no need to load what trains models.
        from patcher_pl.cli.report import run_report_command

        run_report_command(arguments)
        return
    from patcher_pl.cli.console import log_progress
    from patcher_pl.quiet import quiet_libraries, quiet_warnings

    log_progress()
    quiet_warnings()
    if command == "init":
        from patcher_pl.cli.init import run_init_command

        run_init_command(arguments)
        return
    if command in _FUNCTIONS:
        run_function(command, _imported(_FUNCTIONS[command]), arguments)
        return
    quiet_libraries()  # Lightning imports transformers anyway.
    if command == "plan":
        from patcher_pl.cli.plan import run_plan

        run_plan(arguments)
        return
    from patcher_pl.cli.fit import run_lightning

    run_lightning(command, arguments)


def _imported(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def run_function(command: str, function: Callable[..., Any], arguments: list[str]) -> None:
    """Calls `function` with options from the command line and from `--config` files.

    Raises:
        ConfigError: If an option is unknown, missing or has a value that does not fit, or another
            process is working in `run_dir`.
    """
    from patcher_pl.cli.errors import readable_config_errors
    from patcher_pl.cli.given_files import require_single_keys, with_found_files
    from patcher_pl.jobs.lock import held
    from patcher_pl.quiet import quiet_libraries

    arguments = with_found_files(arguments)
    require_single_keys(arguments)
    parser = function_parser(command, function)
    with readable_config_errors():
        options = parser.parse_args(arguments)
        quiet_libraries()  # Not before: who asks for `--help` need not wait for transformers.
        options = parser.instantiate(options)
    options.pop("config", None)
    run_dir = options.get("run_dir")
    # What only writes a folder may be started by one of several: a world is built when it is read.
    if num_processes() > 1 and run_dir is not None and command != "redteam":
        raise ConfigError(
            f"{command} is for one process, and the launcher has started {num_processes()}. It starts "
            "processes of its own, see `engine`; torchrun and srun are for fit and redteam."
        )
    # One of several processes holds the directory for all of them.
    with nullcontext() if run_dir is None or rank() > 0 else held(Path(run_dir)):
        function(**vars(options))


def function_parser(command: str, function: Callable[..., Any]) -> "ArgumentParser":
    """Options from the signature of `function`, on the command line and in `--config` files."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    # Options of other commands, as in a sweep's variants, are passed on and not built here.
    set_parsing_settings(instantiate_subclass_spec_in_any=False)
    parser = ArgumentParser(prog=f"{program()} {command}", exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these options.")
    parser.add_function_arguments(function, fail_untyped=True, sub_configs=True)
    return parser

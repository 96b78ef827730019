"""Options of the `report` command: its directories are positional."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from patcher_pl.cli.program import program
from patcher_pl.errors import ConfigError
from patcher_pl.reports.command import run_report


def run_report_command(arguments: Sequence[str]) -> None:
    """Writes a report; needs neither torch nor lightning.

    Raises:
        ConfigError: If an option is unknown or has a value that does not fit.
        DataError: If a directory has no results, or a file cannot be used.
    """
    from jsonargparse import ArgumentParser

    from patcher_pl.cli.given_files import require_single_keys, with_found_files

    arguments = with_found_files(arguments)
    require_single_keys(arguments)
    parser = ArgumentParser(prog=f"{program()} report", exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these options.")
    parser.add_argument(
        "dirs", nargs="+", type=Path, metavar="DIR", help="Run directories or results files."
    )
    parser.add_function_arguments(run_report, skip={"dirs"}, sub_configs=True)
    try:
        options = parser.instantiate(parser.parse_args(arguments))
    except (argparse.ArgumentError, ValueError) as error:
        raise ConfigError(str(error)) from error
    options.pop("config", None)
    run_report(**vars(options))

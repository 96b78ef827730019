"""The `init` command: configurations for somebody's own model and data."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from patcher_pl.cli.program import program
from patcher_pl.errors import ConfigError

if TYPE_CHECKING:
    from patcher_pl.starter import Starter


def run_init_command(arguments: Sequence[str]) -> None:
    """Parses the command line of `init`; its folder is positional.

    Raises:
        ConfigError: If an option is unknown, missing or has a value that does not fit.
        DataError: See `run_init`.
    """
    from jsonargparse import ArgumentParser

    from patcher_pl.cli.given_files import require_single_keys, with_found_files
    from patcher_pl.quiet import quiet_libraries

    arguments = with_found_files(arguments)
    require_single_keys(arguments)
    parser = ArgumentParser(prog=f"{program()} init", exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these options.")
    parser.add_argument(
        "dir", type=Path, metavar="DIR", help="Folder to write; created if missing."
    )
    parser.add_function_arguments(run_init, skip={"folder"})
    try:
        options = parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    options.pop("config", None)
    folder = options.pop("dir")
    quiet_libraries()
    run_init(folder, **vars(options))


def run_init(
    folder: Path,
    model: str,
    safe: str,
    unsafe: str,
    control: bool = True,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Writes `fit.yaml`, `attack.yaml`, `README.md` and the data that they name into a folder.

    They run as they stand: Patcher with the values of its paper, then the same attacks on the released
    model, the control and the hardened one. Rows are shared out so that what is asked in the end was
    never trained on. Model and data are checked; no weights are loaded.

    Args:
        folder: Where everything goes.
        model: Hub id, directory, or `testbed`.
        safe: What the model should say: refusals of harmful prompts, helpful answers to others. A file (JSONL,
            JSON, CSV, Parquet) or hub id with `prompt` and `response`, or `messages`.
        unsafe: What an attacker would train it to say, likewise.
        control: Have `fit` train plain SFT at the same cost, to compare with.
        seed: Decides which rows are held out, and seeds the runs.
        overwrite: Replace files of an earlier call; others in the folder stay.

    Raises:
        ConfigError: If a file is there already, or the model cannot be used.
        DataError: If data cannot be used: names file, line and field, or says what is too few.
    """
    from patcher_pl.models import LanguageModel
    from patcher_pl.starter import (
        ModelFacts,
        Starter,
        lengths,
        read_rows,
        split_rows,
        write_starter,
    )
    from patcher_pl.starter.folder import require_free

    require_free(folder, overwrite)
    split = split_rows(read_rows(safe, harmful=False), read_rows(unsafe, harmful=True), seed)
    language_model = LanguageModel(path=model)
    facts = ModelFacts.of(language_model)
    rows = [*split.safe, *split.unsafe]
    max_length, max_new_tokens = lengths(language_model, rows, facts.context)
    starter = Starter(
        model=model,
        facts=facts,
        split=split,
        safe=safe,
        unsafe=unsafe,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        control=control,
        seed=seed,
    )
    write_starter(folder, starter)
    _tell(folder, starter)


def _tell(folder: Path, starter: "Starter") -> None:
    split, facts = starter.split, starter.facts
    print(
        f"{facts.name} of {facts.num_parameters / 1e6:,.4g} million weights; conversations of at most "
        f"{starter.max_length} tokens, packed: {'yes' if facts.packs else 'no'}."
    )
    print(
        f"Rows: {len(split.safe)} safe ({split.num_refusals} refusals), {len(split.unsafe)} for the simulated "
        f"attacker, {len(split.attack)} for the red team; asked: {len(split.prompts)} harmful prompts, "
        f"{len(split.benign_prompts)} benign."
    )
    for note in split.notes:
        print(f"Note: {note}")
    print(f"Written to {folder}. Next:")
    for command in (
        ["fit", "--config", folder / "fit.yaml", "--run_dir", folder / "hardened"],
        ["redteam", "--config", folder / "attack.yaml", "--run_dir", folder / "attacked"],
        ["report", folder / "attacked", "--out", folder / "report.html"],
    ):
        print(f"  {program()} {shlex.join(map(str, command))}")

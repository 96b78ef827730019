"""`--help` lists every command, at once."""

import json
import subprocess
import sys

import pytest

from patcher_pl.cli.main import COMMANDS
from tests.commands import ROOT, cli

# Their usage is written by Lightning.
SPOKEN_OF_BY_LIGHTNING = ("fit", "validate", "test")
HEAVY = ["torch", "lightning", "transformers", "datasets", "peft", "matplotlib", "jsonargparse"]


def test_help_lists_all_commands_and_imports_nothing_heavy():
    """Wrong if whoever asks what there is had to wait for torch."""
    probe = (
        "import sys, json, patcher_pl.cli\n"
        "try:\n    patcher_pl.cli.main(['--help'])\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *said, modules = done.stdout.splitlines()
    for command in COMMANDS:
        assert any(line.split()[:1] == [command] for line in said), command
    assert not set(json.loads(modules)) & set(HEAVY)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_options(command):
    said = cli(command, "--help").expect(0)
    assert f"python -m patcher_pl {command} " in said.out or command in SPOKEN_OF_BY_LIGHTNING
    option = {"plan": "--gpu", "testbed": "--out", "redteam": "--model", "sweep": "--variants"}
    option["report"] = "--out"
    assert option.get(command, "--run_dir") in said.out
    assert "--config" in said.out

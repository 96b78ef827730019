"""`--help` lists every command, at once."""

import json
import subprocess
import sys

import pytest

from patcher_pl.cli.main import COMMANDS
from tests.commands import ROOT, cli

# Their usage is written by Lightning.
SPOKEN_OF_BY_LIGHTNING = ("fit", "validate", "test")


# What no command line has to be read with; those of Lightning bring what Lightning brings.
NEVER = {"datasets", "peft", "pandas", "tensorboard", "openai", "optuna", "ray", "torchopt"}
OF_LIGHTNING = {"lightning", "torchmetrics", "transformers", "scipy", "matplotlib", "torch._dynamo"}
OF_MODELS = {"torch", "numpy"}
PRINTED = ("fit", "--config", "configs/testbed/patcher.yaml", "--run_dir", "runs/never")
SPARED = {
    ("--help",): NEVER | OF_LIGHTNING | OF_MODELS | {"jsonargparse", "rich"},
    ("attacker", "--help"): NEVER | OF_LIGHTNING | OF_MODELS | {"jsonargparse"},
    ("report", "--help"): NEVER | OF_LIGHTNING | OF_MODELS,
    ("testbed", "--help"): NEVER | OF_LIGHTNING | OF_MODELS,
    ("redteam", "--help"): NEVER | OF_LIGHTNING,
    ("sweep", "--help"): NEVER | OF_LIGHTNING,
    ("ablate", "--help"): NEVER | OF_LIGHTNING,
    ("compare", "--help"): NEVER | OF_LIGHTNING,
    (*PRINTED, "--print_config"): NEVER | {"transformers.modeling_utils"},
}


def in_a_new_process(*arguments):
    """Returns what a command said, and the modules that it imported."""
    probe = (
        "import sys, json, patcher_pl.cli\n"
        "try:\n    patcher_pl.cli.main(json.loads(sys.argv[1]))\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    command = [sys.executable, "-c", probe, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *said, modules = done.stdout.splitlines()
    return said, set(json.loads(modules))


def test_help_lists_all_commands():
    said, _ = in_a_new_process("--help")
    for command in COMMANDS:
        assert any(line.split()[:1] == [command] for line in said), command


@pytest.mark.parametrize("arguments", SPARED, ids=" ".join)
def test_reading_a_command_line_imports_nothing_that_it_does_not_need(arguments):
    """Wrong if whoever asks what there is had to wait for libraries that only a run uses."""
    said, modules = in_a_new_process(*arguments)
    assert said
    assert not modules & SPARED[arguments]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_options(command):
    said = cli(command, "--help").expect(0)
    assert f"python -m patcher_pl {command} " in said.out or command in SPOKEN_OF_BY_LIGHTNING
    option = {"plan": "--gpu", "testbed": "--out", "redteam": "--model", "sweep": "--variants"}
    option["report"] = "--out"
    assert option.get(command, "--run_dir") in said.out
    assert "--config" in said.out

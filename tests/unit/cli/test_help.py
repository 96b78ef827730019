"""`--help` lists every command, at once."""

import json
import subprocess
import sys

import pytest

from patcher_pl.cli.main import COMMANDS
from tests.commands import ROOT, cli

# What no command line has to be read with; those of Lightning bring what Lightning brings.
NEVER = {"datasets", "peft", "pandas", "tensorboard", "openai", "optuna", "ray", "torchopt"}
OF_LIGHTNING = {"lightning", "torchmetrics", "transformers", "scipy", "matplotlib", "torch._dynamo"}
OF_MODELS = {"torch", "numpy"}
PRINTED = ("fit", "--config", "configs/testbed/patcher.yaml", "--run_dir", "runs/never")
# In the order of what they may import: one process reads them all, which saves its imports.
SPARED = {
    ("--help",): NEVER | OF_LIGHTNING | OF_MODELS | {"jsonargparse", "rich"},
    ("attacker", "--help"): NEVER | OF_LIGHTNING | OF_MODELS | {"jsonargparse"},
    ("report", "--help"): NEVER | OF_LIGHTNING | OF_MODELS,
    ("init", "--help"): NEVER | OF_LIGHTNING | OF_MODELS,
    ("testbed", "--help"): NEVER | OF_LIGHTNING | OF_MODELS,
    ("redteam", "--help"): NEVER | OF_LIGHTNING,
    ("sweep", "--help"): NEVER | OF_LIGHTNING,
    ("ablate", "--help"): NEVER | OF_LIGHTNING,
    ("compare", "--help"): NEVER | OF_LIGHTNING,
    (*PRINTED, "--print_config"): NEVER | {"transformers.modeling_utils"},
}


PROBE = """
import contextlib, io, json, sys, patcher_pl.cli
found = []
for arguments in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            patcher_pl.cli.main(arguments)
        except SystemExit as stop:
            assert not stop.code
    found.append((said.getvalue().splitlines(), sorted(sys.modules)))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def read():
    """What each of `SPARED` said, and the modules that were imported by then."""
    command = [sys.executable, "-c", PROBE, json.dumps(list(SPARED))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(zip(SPARED, json.loads(done.stdout.splitlines()[-1]), strict=True))


def test_help_lists_all_commands(read):
    said, _ = read["--help",]
    for command in COMMANDS:
        assert any(line.split()[:1] == [command] for line in said), command


@pytest.mark.parametrize("arguments", SPARED, ids=" ".join)
def test_reading_a_command_line_imports_nothing_that_it_does_not_need(arguments, read):
    """Wrong if whoever asks what there is had to wait for libraries that only a run uses."""
    said, modules = read[arguments]
    assert said
    assert not set(modules) & SPARED[arguments]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_options(command):
    said = cli(command, "--help").expect(0)
    assert f"python -m patcher_pl {command} " in said.out
    option = {"plan": "--gpu", "testbed": "--out", "redteam": "--model", "sweep": "--variants"}
    option |= {"report": "--out", "init": "--unsafe", "parity": "--backend"}
    assert option.get(command, "--run_dir") in said.out
    assert "--config" in said.out


@pytest.mark.parametrize("command", ["fit", "redteam", "report"])
def test_the_installed_command_is_called_by_its_name(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/patcher-pl", command])
    assert f"usage: patcher-pl {command} " in cli(command, "--help").expect(0).out

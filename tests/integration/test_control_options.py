"""A control with options of its own is trained with them, and nothing else is."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from patcher_pl.jobs import Fit
from tests.commands import cli, patcher_settings, redteam_settings, write_yaml

OPTIMIZER = "model.init_args.optimizer"
OWN = {f"{OPTIMIZER}.init_args.lr": 0.02, f"{OPTIMIZER}.init_args.weight_decay": 0.1}
STOP = {"class_path": "tests.commands.StopAt", "init_args": {"step": 7, "defense": "SFT"}}


def group(run_dir):
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    (found,) = checkpoint["optimizer_states"][0]["param_groups"]
    return found["lr"], found["weight_decay"]


def settings_of(run_dir):
    return json.loads((run_dir / "results.json").read_text())["settings"]


def weights(run_dir):
    return load_file(run_dir / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """A Patcher run and its control, which has options of its own."""
    folder = tmp_path_factory.mktemp("own")
    settings = patcher_settings(inputs) | {"control": OWN, "redteam": redteam_settings(inputs)}
    config = write_yaml(folder / "config.yaml", settings)
    said = cli("fit", "--config", config, "--run_dir", folder / "run").expect(0)
    return SimpleNamespace(dir=folder / "run", said=said, settings=settings)


def test_the_control_has_them_and_the_defense_does_not(run):
    """Wrong if a tuned control were trained with the defense's rate, or the defense with its."""
    assert group(run.dir) == (0.001, 0.01)
    assert group(run.dir / "control") == (0.02, 0.1)


def test_results_say_that_they_are_its_own(run):
    assert settings_of(run.dir)["control"] == {"settings_of_its_own": OWN}
    assert yaml.safe_load((run.dir / "config.yaml").read_text())["control"] == OWN
    assert f"settings of its own: {OPTIMIZER}.init_args.lr = 0.02" in run.said.out
    events = EventAccumulator(str(run.dir / "tensorboard" / "sft-control"), {"tensors": 0}).Reload()
    shown = HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    ).session_start_info.hparams
    assert shown["optimizer.lr"].number_value == 0.02
    assert "attacker.num_steps" not in shown


def test_the_page_says_so_too(run, tmp_path):
    page = tmp_path / "page.html"
    cli("report", run.dir / "results.json", "--out", page).expect(0)
    (_, told) = page.read_text().split("The SFT control was trained with settings of its own")
    for name, value in OWN.items():
        assert f"<code>{name}</code> = {value}</li>" in told


def go_on(stopped, *options):
    command = ("fit", "--config", stopped.folder / "config.yaml", "--run_dir", stopped.dir)
    return cli(*command, "--ckpt_path", "last", *options)


@pytest.fixture
def stopped(run, tmp_path):
    """The same run, stopped while its control was trained."""
    trainer = run.settings["trainer"] | {"callbacks": [STOP]}
    settings = run.settings | {"redteam": None, "trainer": trainer}
    config = write_yaml(tmp_path / "config.yaml", settings)
    cli("fit", "--config", config, "--run_dir", tmp_path / "run").expect(128 + signal.SIGTERM)
    assert group(tmp_path / "run" / "control") == (0.02, 0.1)
    return SimpleNamespace(dir=tmp_path / "run", folder=tmp_path)


def test_a_stopped_control_goes_on_to_the_same_end(run, stopped):
    said = go_on(stopped).expect(0)
    assert f"{OPTIMIZER}" not in said.out.partition("Training the SFT control")[0]
    after, expected = weights(stopped.dir / "control"), weights(run.dir / "control")
    assert all(torch.equal(tensor, after[name]) for name, tensor in expected.items())


def test_a_stopped_control_goes_on_with_other_options_and_says_so(stopped):
    """Wrong if the control went on with its old rate while the results named the new one."""
    refused = go_on(stopped, f"--control.{OPTIMIZER}", "torch.optim.SGD").expect(2)
    assert "AdamW -> torch.optim.SGD (its state is of no use" in refused.err
    said = go_on(stopped, f"--control.{OPTIMIZER}.init_args.lr", 0.03).expect(0)
    told = [line.strip() for line in said.out.splitlines() if " -> " in line]
    change = f"{OPTIMIZER}.init_args.lr: 0.02 -> 0.03"
    assert set(told) == {change, f"control.{change}"}
    assert group(stopped.dir / "control") == (0.03, 0.1)
    assert group(stopped.dir) == (0.001, 0.01)
    control = settings_of(stopped.dir)["control"]
    assert control["settings_of_its_own"] == OWN | {f"{OPTIMIZER}.init_args.lr": 0.03}
    assert control["changed_on_the_way"] == [{"step": 7, "changes": [change]}]


def test_runs_whose_controls_differ_are_different_runs(tmp_path):
    """Wrong if a sweep took the run of another control for its own."""
    base = write_yaml(tmp_path / "base.yaml", {"seed_everything": 0})
    first, second = (
        Fit.plan(tmp_path, base, {"control": options}) for options in (OWN, {OPTIMIZER: "SGD"})
    )
    assert first.digest != second.digest
    assert json.loads(first.arguments[-1].partition("=")[2]) == OWN

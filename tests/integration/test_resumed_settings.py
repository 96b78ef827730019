"""A run that goes on with other settings says so, and does what it says."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.commands import cli, redteam_settings, sft_settings, write_yaml

LR = "--model.init_args.optimizer.init_args.lr"
SCHEDULER = "--model.init_args.scheduler"


@pytest.fixture(scope="module")
def begun(inputs, tmp_path_factory):
    """A run of two steps in `run`, its inputs beside it."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(inputs, folder / "inputs")
    settings = sft_settings(folder / "inputs")
    settings["trainer"]["max_steps"] = 2
    config = write_yaml(folder / "config.yaml", settings)
    cli("fit", "--config", config, "--run_dir", folder / "run").expect(0)
    return folder


@pytest.fixture
def folder(begun, tmp_path, monkeypatch):
    """A copy of it, in the place where its configuration looks for its inputs."""
    copy = shutil.copytree(begun, tmp_path / "copy", symlinks=True)
    text = (copy / "config.yaml").read_text().replace(str(begun), str(copy))
    (copy / "config.yaml").write_text(text)
    return copy


def go_on(folder, *options):
    last = folder / "run" / "checkpoints" / "last.ckpt"
    command = ("fit", "--config", folder / "config.yaml", "--run_dir", folder / "run")
    return cli(*command, "--ckpt_path", last, "--trainer.max_steps", 4, *options)


def checkpoint(folder):
    return torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)


def test_what_is_taken_is_told_done_and_recorded(folder, inputs):
    """Wrong if a run went on with its old rate while `config.yaml` recorded the new one."""
    redteam = write_yaml(folder / "redteam.yaml", redteam_settings(inputs))
    said = go_on(folder, LR, 0.5, "--redteam", redteam).expect(0)
    told = [line.strip() for line in said.out.splitlines() if " -> " in line]
    assert f"{LR.removeprefix('--')}: 0.001 -> 0.5" in told
    assert "trainer.max_steps: 2 -> 4" in told
    assert "redteam: None -> (several settings)" in told
    assert len(told) == 3, "inputs that were moved are the same inputs"
    (group,) = checkpoint(folder)["optimizer_states"][0]["param_groups"]
    assert group["lr"] == 0.5
    assert group["betas"] == (0.9, 0.999)
    written = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    assert written["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.5
    (change,) = json.loads((folder / "run" / "results.json").read_text())["settings"][
        "changed_on_the_way"
    ]
    assert change["step"] == 2
    assert change["changes"] == told
    again = go_on(folder, LR, 0.5, "--redteam", redteam, "--trainer.max_steps", 5).expect(0)
    assert f"{LR.removeprefix('--')}" not in again.out
    assert len(checkpoint(folder)["run"]["history"]) == 2


def test_a_run_that_goes_on_as_it_was_says_nothing(folder):
    assert " -> " not in go_on(folder, "--trainer.max_steps", 2).expect(0).out


def other_rows(folder):
    path = folder / "inputs" / "safe.jsonl"
    path.write_text(path.read_text().replace("petals", "leaves"))
    return "safe.jsonl (the position in the data means nothing"


def other_base(folder):
    path = folder / "inputs" / "model" / "model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).flatten()[0] += 1
    save_file(weights, path, {"format": "pt"})
    return "model (the weights come from that model)"


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (other_rows, ()),
        (other_base, ()),
        (lambda _: "seed_everything: 3 -> 4", ("--seed_everything", 4)),
        (lambda _: "AdamW -> torch.optim.SGD", ("--model.init_args.optimizer", "torch.optim.SGD")),
        (lambda _: "max_length: 1024 -> 64", ("--model.language_model.chat.max_length", 64)),
        (
            lambda _: "scheduler: None -> (several settings) (the schedule",
            (SCHEDULER, "torch.optim.lr_scheduler.ExponentialLR", f"{SCHEDULER}.gamma", 0.9),
        ),
    ],
)
def test_what_cannot_change_on_the_way_is_refused(folder, change, options):
    """Wrong if results named data, a base model or a schedule that was not trained with."""
    expected = change(folder)
    before = (folder / "run" / "config.yaml").read_text()
    said = go_on(folder, *options).expect(2)
    assert "cannot change on the way" in said.err
    assert expected in said.err
    assert (folder / "run" / "config.yaml").read_text() == before
    assert checkpoint(folder)["global_step"] == 2


def test_a_schedule_keeps_the_rate_that_it_began_with(inputs, tmp_path):
    settings = sft_settings(inputs)
    settings["trainer"]["max_steps"] = 2
    settings["model"]["init_args"]["scheduler"] = {
        "class_path": "torch.optim.lr_scheduler.ExponentialLR",
        "init_args": {"gamma": 0.5},
    }
    write_yaml(tmp_path / "config.yaml", settings)
    cli("fit", "--config", tmp_path / "config.yaml", "--run_dir", tmp_path / "run").expect(0)
    said = go_on(tmp_path, LR, 0.5).expect(2)
    assert "lr: 0.001 -> 0.5 (the schedule goes on" in said.err
    go_on(tmp_path).expect(0)


def test_checkpoints_of_earlier_versions_go_on_and_say_what_they_do_not_know(folder):
    path = (folder / "run" / "checkpoints" / "last.ckpt").resolve()
    content = torch.load(path, weights_only=True)
    del content["run"]
    torch.save(content, path)
    assert "does not say with which settings it was written" in go_on(folder).expect(0).out

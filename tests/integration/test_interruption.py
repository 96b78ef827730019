"""SIGTERM and Ctrl-C: a run saves what it has, says how to go on, and goes on as if nothing was."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from patcher_pl.redteam import FullFinetuning
from patcher_pl.redteam.job import AttackJob
from patcher_pl.reports import Results
from tests.commands import (
    ROOT,
    cli,
    command_line,
    patcher_settings,
    redteam_settings,
    sft_settings,
    write_yaml,
)

# As whoever runs the tests has them; in the background, for example, Ctrl-C is ignored.
BEFORE = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
SIGNALS = [
    pytest.param(signal.SIGTERM, id="SIGTERM"),
    pytest.param(signal.SIGINT, id="SIGINT"),
]


def weights(run_dir):
    return load_file(run_dir / "model" / "model.safetensors")


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def assert_says_how_to_go_on(message, number, run_dir):
    assert f"stopped by {signal.Signals(number).name} after step" in message
    assert str(run_dir / "checkpoints") in message
    assert "--ckpt_path last" in message
    assert "Traceback" not in message


@pytest.fixture(scope="module")
def uninterrupted(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    settings = patcher_settings(inputs) | {"control": True}
    config = write_yaml(folder / "config.yaml", settings)
    cli("fit", "--config", config, "--run_dir", folder / "run").expect(0)
    return folder / "run"


@pytest.mark.parametrize(
    ("step", "defense"),
    [
        pytest.param(1, "Patcher", id="before-the-first-attack"),
        pytest.param(4, "Patcher", id="within-a-round"),
        pytest.param(5, "Patcher", id="at-the-end-of-a-round"),
        pytest.param(6, "Patcher", id="behind-the-first-epoch"),
        pytest.param(8, "Patcher", id="after-the-last-step"),
        pytest.param(7, "SFT", id="in-the-control"),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_end(inputs, tmp_path, uninterrupted, step, defense):
    settings = patcher_settings(inputs) | {"control": True}
    plain = write_yaml(tmp_path / "config.yaml", settings)
    stop = {"class_path": "tests.commands.StopAt", "init_args": {"step": step, "defense": defense}}
    settings["trainer"]["callbacks"] = [stop]
    stopping = write_yaml(tmp_path / "stopping.yaml", settings)
    run_dir = tmp_path / "run"
    stopped = cli("fit", "--config", stopping, "--run_dir", run_dir).expect(128 + signal.SIGTERM)
    part = run_dir if defense == "Patcher" else run_dir / "control"
    assert_says_how_to_go_on(stopped.err.splitlines()[-1], signal.SIGTERM, part)
    assert f"after step {step};" in stopped.err
    checkpoint = torch.load(part / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == step
    cli("fit", "--config", plain, "--run_dir", run_dir, "--ckpt_path", "last").expect(0)
    assert_same_weights(weights(run_dir), weights(uninterrupted))
    assert_same_weights(weights(run_dir / "control"), weights(uninterrupted / "control"))


def test_signals_work_as_before_once_a_run_is_over(uninterrupted):
    """Wrong if Ctrl-C did nothing in the program that had called `fit`."""
    assert {number: signal.getsignal(number) for number in BEFORE} == BEFORE


def long_settings(inputs, phase, announcement):
    """Settings of a run that lasts a few seconds in the phase where the signal is to arrive."""
    if phase == "steps":
        settings = sft_settings(inputs)
        settings["trainer"]["max_steps"] = 400
        settings["checkpoint_every_n_steps"] = 20
        return settings
    settings = patcher_settings(inputs)
    settings["trainer"]["max_steps"] = 4
    attacker = settings["model"]["init_args"]["attacker"]
    attacker["class_path"] = "tests.commands.AnnouncedAttacker"
    attacker["init_args"] |= {"num_steps": 500, "announcement": str(announcement)}
    return settings


def wait_for(path: Path, process: subprocess.Popen, timeout_s: float = 120) -> None:
    """Waits until a file is there, and fails where its writer ends before that."""
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} was not written in {timeout_s} s"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        pytest.param("steps", signal.SIGTERM, id="steps-SIGTERM"),
        pytest.param("attack", signal.SIGINT, id="attack-SIGINT", marks=pytest.mark.slow),
        pytest.param("steps", signal.SIGINT, id="steps-SIGINT", marks=pytest.mark.slow),
        pytest.param("attack", signal.SIGTERM, id="attack-SIGTERM", marks=pytest.mark.slow),
    ],
)
@pytest.mark.long
def test_a_process_that_is_stopped_can_be_resumed(inputs, tmp_path, phase, number):
    announcement = tmp_path / "attacking"
    settings = long_settings(inputs, phase, announcement)
    config = write_yaml(tmp_path / "config.yaml", settings)
    run_dir = tmp_path / "run"
    last = run_dir / "checkpoints" / "last.ckpt"
    process = subprocess.Popen(
        command_line("fit", "--config", config, "--run_dir", run_dir),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(last if phase == "steps" else announcement, process)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + number, said
    assert_says_how_to_go_on(said.splitlines()[-1], number, run_dir)
    reached = torch.load(last, weights_only=True)["global_step"]
    # An attack that is cut short has not happened: the run stands where it was before.
    assert reached == 2 if phase == "attack" else 20 <= reached < 400
    assert not list(run_dir.rglob("*.tmp"))

    again = ("fit", "--config", config)
    cli(*again, "--run_dir", run_dir, "--ckpt_path", "last").expect(0)
    cli(*again, "--run_dir", tmp_path / "uninterrupted").expect(0)
    assert_same_weights(weights(run_dir), weights(tmp_path / "uninterrupted"))


def test_a_second_ctrl_c_ends_a_run_at_once(inputs, tmp_path):
    settings = sft_settings(inputs)
    impatient = {"step": 2, "defense": "SFT", "number": int(signal.SIGINT)}
    stop = {"class_path": "tests.commands.StopAt", "init_args": impatient}
    settings["trainer"]["callbacks"] = [stop, stop]
    config = write_yaml(tmp_path / "config.yaml", settings)
    said = cli("fit", "--config", config, "--run_dir", tmp_path / "run")
    assert said.status != 0
    assert "Traceback" not in said.err
    assert not (tmp_path / "run" / "model").exists()


def test_an_interrupted_red_team_goes_on_after_its_last_curve(inputs, tmp_path, monkeypatch):
    """Wrong if the training, or the curves that were there, were lost with the attack under way."""
    settings = sft_settings(inputs) | {"redteam": redteam_settings(inputs) | {"seeds": [0, 1]}}
    config = write_yaml(tmp_path / "config.yaml", settings)
    command = ("fit", "--config", config, "--run_dir", tmp_path / "run")
    results = tmp_path / "run" / "results.json"
    write = AttackJob.write

    def write_then_interrupt(self, content):
        write(self, content)
        raise KeyboardInterrupt

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AttackJob, "write", write_then_interrupt)
        said = cli(*command).expect(128 + signal.SIGINT)
    assert "Traceback" not in said.err
    assert [curve.seed for curve in Results.load(results).curves] == [0]
    with monkeypatch.context() as patch:
        patch.setattr(FullFinetuning, "run", interrupt)
        cli(*command, "--ckpt_path", "last").expect(128 + signal.SIGINT)
    assert [curve.seed for curve in Results.load(results).curves] == [0]
    resumed = cli(*command, "--ckpt_path", "last").expect(0)
    assert "seed 1, after 2 steps" in resumed.out
    assert "seed 0, after 2 steps" not in resumed.out
    assert [curve.seed for curve in Results.load(results).curves] == [0, 1]

"""`fit` with attackers in processes of their own: what happens to them, and what is left."""

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from patcher_pl.attackers import FineTuningAttacker
from tests.commands import ROOT, cli, command_line, patcher_settings, write_yaml


def concurrent_settings(inputs: Path, **options: Any) -> dict[str, Any]:
    """The short Patcher run with its attacker in a process of its own, in lock step."""
    settings = patcher_settings(inputs)
    init_args = settings["model"]["init_args"]
    init_args["attacker"] = {
        "class_path": "patcher_pl.attackers.ConcurrentAttacker",
        "init_args": {"population": [{"attacker": init_args["attacker"]}], **options},
    }
    if "lock_step" not in options:
        init_args["attacker"]["init_args"]["lock_step"] = True
    return settings


@dataclass(frozen=True, kw_only=True)
class DyingAttacker(FineTuningAttacker):
    """Is killed at the second step of its first attack, once."""

    died: str

    def attack(self, model: Any, weights: Any, batches: Any, before_step: Any) -> Any:
        calls = iter([None])

        def die() -> None:
            if next(calls, "late") == "late" and not Path(self.died).exists():
                Path(self.died).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            before_step()

        return super().attack(model, weights, batches, die)


class Explode(Callback):
    """An error of a kind that nobody has thought of."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        raise ZeroDivisionError("no more potion")


def weights(run_dir):
    return load_file(run_dir / "model" / "model.safetensors")


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def assert_nothing_is_left(run_dir, expect_mailbox=True):
    """Neither processes of the run nor its mailbox."""
    assert not attackers_of(run_dir)
    log = run_dir / "attackers" / "0.log"
    found = re.findall(r"ready at\s+(\S+)\.", log.read_text()) if log.exists() else []
    assert bool(found) or not expect_mailbox
    for mailbox in found:
        assert not Path(mailbox).exists()


def attackers_of(run_dir):
    """Processes that attack for this run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "attacker" in line and str(run_dir / "config.yaml") in line:
            found.append(int(process.name))
    return found


def wait_until(condition, process=None, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def sequential(inputs, tmp_path_factory):
    """Weights of the run whose attacks happen in between."""
    folder = tmp_path_factory.mktemp("sequential")
    config = write_yaml(folder / "config.yaml", patcher_settings(inputs))
    cli("fit", "--config", config, "--run_dir", folder / "run").expect(0)
    return weights(folder / "run")


@pytest.mark.long
def test_a_run_that_is_stopped_goes_on_to_the_sequential_end(inputs, tmp_path, sequential):
    """In lock step. Neither SIGTERM nor the end leave a process, or anything in memory."""
    settings = concurrent_settings(inputs)
    plain = write_yaml(tmp_path / "config.yaml", settings)
    settings["trainer"]["callbacks"] = [
        {"class_path": "tests.commands.StopAt", "init_args": {"step": 4}}
    ]
    stopping = write_yaml(tmp_path / "stopping.yaml", settings)
    run_dir = tmp_path / "run"
    cli("fit", "--config", stopping, "--run_dir", run_dir).expect(128 + signal.SIGTERM)
    assert_nothing_is_left(run_dir)
    cli("fit", "--config", plain, "--run_dir", run_dir, "--ckpt_path", "last").expect(0)
    assert_nothing_is_left(run_dir)
    assert_same_weights(weights(run_dir), sequential)
    events = EventAccumulator(str(run_dir / "tensorboard" / "patcher")).Reload()
    assert {
        "attack/loss",
        "concurrent/staleness",
        "concurrent/attacker_utilization",
        "concurrent/defender_utilization",
        "concurrent/overlap_gained_s",
        "concurrent/wasted_gradient_evaluations",
        "concurrent/restarts",
    } <= set(events.Tags()["scalars"])


@pytest.mark.long
def test_an_attacker_that_is_killed_is_restarted(inputs, tmp_path, sequential):
    """In the middle of an attack, which is repeated as it was."""
    settings = concurrent_settings(inputs)
    (member,) = settings["model"]["init_args"]["attacker"]["init_args"]["population"]
    member["attacker"]["class_path"] = "tests.integration.test_concurrent.DyingAttacker"
    member["attacker"]["init_args"]["died"] = str(tmp_path / "died")
    config, run_dir = write_yaml(tmp_path / "config.yaml", settings), tmp_path / "run"
    cli("fit", "--config", config, "--run_dir", run_dir).expect(0)
    assert (tmp_path / "died").exists()
    assert (run_dir / "attackers" / "0.log").read_text().count("is ready at") == 2
    assert_same_weights(weights(run_dir), sequential)
    assert_nothing_is_left(run_dir)


def test_an_error_of_the_defender_ends_the_attacker(inputs, tmp_path):
    settings = concurrent_settings(inputs, lock_step=False)
    settings["trainer"]["callbacks"] = [{"class_path": "tests.integration.test_concurrent.Explode"}]
    config, run_dir = write_yaml(tmp_path / "config.yaml", settings), tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        cli("fit", "--config", config, "--run_dir", run_dir)
    assert_nothing_is_left(run_dir, expect_mailbox=False)


@pytest.mark.long
def test_an_attacker_that_cannot_run_is_an_error_that_says_why(inputs, tmp_path):
    """And not a run that waits for it for ever."""
    config = write_yaml(
        tmp_path / "config.yaml", concurrent_settings(inputs, devices=["nowhere:0"])
    )
    said = cli("fit", "--config", config, "--run_dir", tmp_path / "run").expect(2)
    message = said.err.splitlines()[-1]
    assert "attacker 0 cannot run" in message
    assert "nowhere" in message
    assert_nothing_is_left(tmp_path / "run", expect_mailbox=False)


@pytest.mark.long
def test_an_attacker_as_a_job_of_its_own(inputs, tmp_path, sequential):
    """Started first; it ends by itself once the defender has finished."""
    settings = concurrent_settings(inputs, launch=False, mailbox=str(tmp_path / "mailbox"))
    config, run_dir = write_yaml(tmp_path / "config.yaml", settings), tmp_path / "run"
    with (tmp_path / "log").open("w") as log:
        attacker = subprocess.Popen(
            command_line("attacker", "--config", config, "--run_dir", run_dir),
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )
        try:
            cli("fit", "--config", config, "--run_dir", run_dir).expect(0)
            assert attacker.wait(60) == 0
        finally:
            attacker.kill()
            attacker.wait()
    assert_same_weights(weights(run_dir), sequential)
    left = [path.name for path in (tmp_path / "mailbox").rglob("*") if path.is_file()]
    assert sorted(left) == ["attacker-0.json", "finished"]


def test_a_rehearsal_leaves_nothing(inputs, tmp_path):
    config = write_yaml(tmp_path / "config.yaml", concurrent_settings(inputs))
    command = ("fit", "--config", config, "--run_dir", tmp_path / "run")
    cli(*command, "--trainer.fast_dev_run", "true").expect(0)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model.attacker=patcher_pl.attackers.FineTuningAttacker"], "ConcurrentAttacker"),
        (["--member", "1"], r"--member must be in 0..0, got 1"),
        ([], r"--mailbox: name the directory"),
    ],
)
def test_an_attacker_command_that_cannot_work_says_so(inputs, tmp_path, change, message):
    settings = concurrent_settings(inputs)
    if "FineTuning" in "".join(change):
        settings, change = patcher_settings(inputs), []
    config = write_yaml(tmp_path / "config.yaml", settings)
    command = ("attacker", "--config", config, "--run_dir", tmp_path / "run")
    said = cli(*command, *change).expect(2)
    assert re.search(message, said.err)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_defender_leaves_nothing(inputs, tmp_path, sequential):
    """SIGKILL: the attacker notices, and takes the mailbox along. The run goes on afterwards."""
    settings = concurrent_settings(inputs)
    settings["trainer"]["max_steps"] = 2000
    settings["checkpoint_every_n_steps"] = 2
    config, run_dir = write_yaml(tmp_path / "config.yaml", settings), tmp_path / "run"
    defender = subprocess.Popen(
        command_line("fit", "--config", config, "--run_dir", run_dir),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = run_dir / "checkpoints"
    try:
        wait_until(lambda: any(checkpoints.glob("step-0000000[4-9].ckpt")), defender)
        assert attackers_of(run_dir)
    finally:
        defender.kill()
        defender.wait()
    wait_until(lambda: not attackers_of(run_dir))
    assert_nothing_is_left(run_dir)
    # As far as the sequential run went, which the killed run may have passed by now.
    for checkpoint in sorted(checkpoints.glob("step-*")):
        if int(checkpoint.stem.removeprefix("step-")) > 8:
            pytest.skip("the machine was too fast")
    again = ("--trainer.max_steps", 8, "--ckpt_path", "last")
    cli("fit", "--config", config, "--run_dir", run_dir, *again).expect(0)
    assert_same_weights(weights(run_dir), sequential)

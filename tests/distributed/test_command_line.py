"""`fit` in two processes, started by Lightning and by torchrun, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from patcher_pl.callbacks.run_checkpoint import find_last
from tests.commands import (
    ROOT,
    StopAt,
    command_line,
    patcher_settings,
    redteam_settings,
    write_inputs,
    write_yaml,
)

pytestmark = pytest.mark.slow

TWO_PROCESSES = {
    "devices": 2,
    "strategy": {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
    },
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


COPIES = {
    "devices": 2,
    "strategy": "replicated",
}


def settings_of(
    inputs: Path, num_processes: int, several: dict[str, Any] = TWO_PROCESSES
) -> dict[str, Any]:
    settings = patcher_settings(inputs)
    settings["data"]["batch_size"] = 4 // num_processes
    settings["control"] = True
    settings["redteam"] = redteam_settings(inputs)
    settings["checkpoint_every_n_steps"] = 1
    settings["probe_every_n_steps"] = 3
    if num_processes > 1:
        settings["trainer"] |= several
    return settings


def start(*command: object) -> subprocess.Popen:
    """Starts a command whose processes can be killed together."""
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said[-6000:]
    return said


def fit(config: Path, run_dir: Path, *options: str) -> subprocess.Popen:
    return start(*command_line("fit", "--config", config, "--run_dir", run_dir, *options))


def assert_same(one: Path, other: Path, tolerance: float = 0.0) -> None:
    for model in ("model", "control/model"):
        weights = load_file(other / model / "model.safetensors")
        for name, value in load_file(one / model / "model.safetensors").items():
            assert float((value - weights[name]).abs().max()) <= tolerance, name


def probes(run: Path) -> list[tuple[int, float]]:
    """Steps and attack success rates of the probes, and of the red team after them."""
    events = EventAccumulator(str(run / "tensorboard" / "patcher")).Reload()
    return [(event.step, event.value) for event in events.Scalars("robustness/asr_at_2")]


@pytest.fixture(scope="module")
def uninterrupted(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = write_yaml(folder / "config.yaml", settings_of(inputs, 2))
    said = finish(fit(config, folder / "run"))
    assert said.count("Trained patcher") == 1  # by the first process alone
    return folder / "run"


def test_a_run_leaves_what_a_run_of_one_process_leaves(inputs, uninterrupted, tmp_path):
    config = write_yaml(tmp_path / "config.yaml", settings_of(inputs, 1))
    finish(fit(config, tmp_path / "run"))
    assert_same(uninterrupted, tmp_path / "run", tolerance=1e-4)  # AdamW in float32
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {path.name for path in uninterrupted.iterdir()} == names
    runs = {path.name for path in (uninterrupted / "tensorboard").iterdir()}
    assert runs == {"patcher", "sft-control"}
    probed = [probes(run) for run in (uninterrupted, tmp_path / "run")]
    assert probed[0] == probed[1]
    assert [step for step, _ in probed[0]] == [3, 6, 8]  # At the end, the red team.


def test_two_whole_models_leave_what_one_leaves(inputs, tmp_path):
    """With the exact hypergradient, killed in between; probes and the red team divide the questions."""
    for name, num_processes in (("one", 1), ("two", 2)):
        settings = settings_of(inputs, num_processes, COPIES)
        settings["model"]["init_args"]["language_model"]["dtype"] = "float64"
        settings["model"]["init_args"]["hypergradient"] = "patcher_pl.hypergradients.Adjoint"
        settings["checkpoint_in_background"] = True
        plain = write_yaml(tmp_path / f"{name}.yaml", settings)
        if num_processes == 2:
            stop = {
                "class_path": "tests.distributed.test_command_line.StopFirst",
                "init_args": {"step": 4},
            }
            settings["trainer"]["callbacks"] = [stop]
            process = fit(write_yaml(tmp_path / "stopping.yaml", settings), tmp_path / name)
            said, _ = process.communicate(timeout=400)
            assert process.returncode == 128 + signal.SIGTERM, said[-6000:]
        finish(fit(plain, tmp_path / name, "--ckpt_path", "auto"))
    assert_same(tmp_path / "two", tmp_path / "one", tolerance=1e-9)
    assert probes(tmp_path / "two") == probes(tmp_path / "one")
    one, two = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")
    )
    assert two["curves"] == one["curves"]


def test_torchrun_starts_the_same_run(inputs, uninterrupted, tmp_path):
    config = write_yaml(tmp_path / "config.yaml", settings_of(inputs, 2))
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    fit_options = ("fit", "--config", config, "--run_dir", tmp_path / "run")
    finish(start(*torchrun, "-m", "patcher_pl", *fit_options))
    assert_same(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize("checkpoint", [1, 4, 7])
def test_a_killed_run_ends_as_an_uninterrupted_one(inputs, uninterrupted, tmp_path, checkpoint):
    """SIGKILL for all processes as soon as a checkpoint is there: mostly while the next is written."""
    config = write_yaml(tmp_path / "config.yaml", settings_of(inputs, 2))
    run_dir = tmp_path / "run"
    process = fit(config, run_dir)
    deadline = time.monotonic() + 200
    while not (run_dir / "checkpoints" / f"step-{checkpoint:08d}.ckpt").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finish(fit(config, run_dir, "--ckpt_path", "auto"))
    assert_same(uninterrupted, run_dir)
    assert not [*run_dir.rglob("*.tmp"), *run_dir.rglob("*.old")]


def test_a_run_that_was_killed_while_it_wrote_ends_as_one_that_was_not(
    inputs, uninterrupted, tmp_path
):
    """A checkpoint in the background, all parts of which are there but for half of the last file."""
    settings = settings_of(inputs, 2) | {"checkpoint_in_background": True}
    plain = write_yaml(tmp_path / "config.yaml", settings)
    kill = {"class_path": "tests.commands.KillWhileWriting", "init_args": {"step": 4}}
    settings["trainer"]["callbacks"] = [kill]
    killing = write_yaml(tmp_path / "killing.yaml", settings)
    run_dir = tmp_path / "run"
    process = fit(killing, run_dir)
    try:
        assert process.wait(timeout=400) == -signal.SIGKILL
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    checkpoints = run_dir / "checkpoints"
    (torn,) = checkpoints.glob(".step-00000004.ckpt.*.tmp")
    assert (torn / "meta.pt").exists() and not (torn / "manifest.json").exists()
    assert find_last(checkpoints).name == "step-00000003.ckpt"
    finish(fit(plain, run_dir, "--ckpt_path", "auto"))
    assert_same(uninterrupted, run_dir)
    assert not [*run_dir.rglob("*.tmp"), *run_dir.rglob("*.old")]


def test_sigterm_to_the_first_process_stops_both(inputs, uninterrupted, tmp_path):
    settings = settings_of(inputs, 2)
    stop = {"class_path": "tests.distributed.test_command_line.StopFirst", "init_args": {"step": 4}}
    settings["trainer"]["callbacks"] = [stop]
    config = write_yaml(tmp_path / "stopping.yaml", settings)
    process = fit(config, tmp_path / "run")
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 128 + signal.SIGTERM, said[-6000:]
    assert "stopped by SIGTERM after step 4" in said
    del settings["trainer"]["callbacks"]
    plain = write_yaml(tmp_path / "config.yaml", settings)
    finish(fit(plain, tmp_path / "run", "--ckpt_path", "last"))
    assert_same(uninterrupted, tmp_path / "run")
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["trainer"]["devices"] == 2


class StopFirst(StopAt):
    """Sends SIGTERM to the first process only."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        if trainer.is_global_zero:
            super().on_train_batch_end(trainer, pl_module, *arguments)

"""Commands that run many jobs are killed or stopped in the middle: nobody is left behind."""

import signal
import subprocess

import pytest

from tests.commands import (
    ROOT,
    command_line,
    patcher_settings,
    redteam_settings,
    sft_settings,
    write_yaml,
)
from tests.integration.test_ablate import ablation_settings
from tests.integration.test_redteam_kill import descendants, is_running, wait_for


def begin(command, folder, content):
    """Starts a command in a process of its own."""
    config = write_yaml(folder / f"{command}.yaml", content)
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen(
            command_line(command, "--config", config, "--run_dir", folder / "run"),
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )


def end(process, number, is_under_way, folder):
    """Sends a signal once jobs are under way, and waits until none of them is left."""
    try:
        wait_for(
            lambda: is_under_way() or process.poll() is not None, "nothing has begun in this time"
        )
        assert process.poll() is None, (folder / "log.txt").read_text()
        left = descendants(process.pid)
        assert left
        process.send_signal(number)
        status = process.wait(timeout=120)
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not any(map(is_running, left)), "jobs outlived the command")
    return status


@pytest.fixture
def endless(inputs, tmp_path):
    """The configuration of a run of `fit` that does not end by itself, and saves checkpoints."""
    team = redteam_settings(inputs)
    write_yaml(tmp_path / "redteam.yaml", team)
    settings = sft_settings(inputs) | {"num_threads": 1, "redteam": team}
    settings["trainer"]["max_steps"] = 10**6
    return write_yaml(tmp_path / "endless.yaml", settings)


def fits_under_way(folder, num_fits):
    return lambda: len(list((folder / "run").rglob("last.ckpt"))) == num_fits


@pytest.mark.long
def test_a_killed_sweep_leaves_no_run_behind(endless, tmp_path):
    """Wrong if the next sweep ran beside what the first one had left, in the same directories."""
    content = {"base": endless.name, "variants": {"one": {}, "two": {}}, "num_processes": 2}
    process = begin("sweep", tmp_path, content)
    end(process, signal.SIGKILL, fits_under_way(tmp_path, 2), tmp_path)


@pytest.mark.slow
def test_a_killed_comparison_leaves_no_run_behind(endless, tmp_path):
    content = {
        "max_gradient_evaluations": 10**6,
        "redteam": "redteam.yaml",
        "selection": {"redteam": "redteam.yaml", "num_trials": 1, "seeds": [9]},
        "defenses": {"sft": {"fit": endless.name}},
        "num_processes": 1,
    }
    process = begin("compare", tmp_path, content)
    end(process, signal.SIGKILL, fits_under_way(tmp_path, 1), tmp_path)


@pytest.mark.slow
def test_a_killed_ablation_leaves_no_measurement_behind(inputs, tmp_path):
    write_yaml(tmp_path / "base.yaml", patcher_settings(inputs) | {"num_threads": 1})
    begun = tmp_path / "begun"
    content = ablation_settings() | {"model": str(inputs / "model")}
    content["comparison"]["reference"] = {
        "class_path": "tests.estimators.Endless",
        "init_args": {"announcement": str(begun)},
    }
    process = begin("ablate", tmp_path, content)
    end(process, signal.SIGKILL, begun.exists, tmp_path)


@pytest.mark.long
def test_a_stopped_sweep_lets_its_runs_save_checkpoints(endless, tmp_path):
    """Wrong if SIGTERM, which schedulers send first, cost what was trained since the last one."""
    content = {"base": endless.name, "variants": {"one": {"checkpoint_every_n_steps": 1}}}
    process = begin("sweep", tmp_path, content)
    status = end(process, signal.SIGTERM, fits_under_way(tmp_path, 1), tmp_path)
    assert status == 128 + signal.SIGTERM
    said = (tmp_path / "log.txt").read_text()
    assert "stopped; finished runs and checkpoints are kept. Go on with the same command." in said
    log = (tmp_path / "run" / "one" / "seed-0" / "log.txt").read_text()
    assert "stopped by SIGTERM after step" in log

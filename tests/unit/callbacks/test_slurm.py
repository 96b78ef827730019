"""A job whose time is up saves, goes back into the queue, and goes on from there."""

import os
import signal
import stat

import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment

from patcher_pl.callbacks.graceful_stop import requeue_job
from tests.commands import cli, sft_settings, write_inputs, write_yaml


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stand-in for SLURM's command that notes what it is asked, and refuses job 13."""
    notes = tmp_path / "asked"
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {notes}\n'
        '[ "$2" != 13 ] || { echo "Invalid job id" >&2; exit 1; }\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    return notes


def test_a_job_is_named_as_slurm_names_it(scontrol, monkeypatch):
    requeue_job()
    assert not scontrol.exists()  # no job at all
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    requeue_job()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    requeue_job()
    assert scontrol.read_text().splitlines() == ["requeue 7", "requeue 5_2"]


def test_a_refusal_is_told_and_no_more(scontrol, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    requeue_job()
    assert "job 13 was not requeued: Invalid job id" in caplog.text
    monkeypatch.setenv("PATH", "/nonexistent")
    requeue_job()
    assert "No such file" in caplog.text


@pytest.mark.parametrize(
    ("number", "asked"),
    [(signal.SIGUSR1, ["requeue 9"]), (signal.SIGTERM, []), (signal.SIGUSR2, [])],
)
def test_only_the_warning_signal_requeues(scontrol, monkeypatch, tmp_path, number, asked):
    """SIGTERM may come from `scancel`, SIGUSR2 from `SlurmArray`, whose task puts itself back."""
    # As srun sets them, so that Lightning too knows the job and would handle signals itself.
    job = {"JOB_ID": 9, "JOB_NAME": "train", "NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert SLURMEnvironment.detect()
    inputs = write_inputs(tmp_path)
    settings = sft_settings(inputs)
    init_args = {"step": 2, "defense": "SFT", "number": int(number)}
    stop = {"class_path": "tests.commands.StopAt", "init_args": init_args}
    settings["trainer"]["callbacks"] = [stop]
    config = write_yaml(tmp_path / "config.yaml", settings)
    run_dir = tmp_path / "run"
    stopped = cli("fit", "--config", config, "--run_dir", run_dir).expect(128 + number)
    assert f"stopped by {number.name} after step 2" in stopped.err
    assert (run_dir / "checkpoints" / "step-00000002.ckpt").exists()
    assert not list(run_dir.rglob("hpc_ckpt*"))  # what Lightning's own handler writes
    assert (scontrol.read_text().splitlines() if scontrol.exists() else []) == asked

"""One process at a time works in a directory."""

import os
import subprocess
import sys
import time

import pytest
from filelock import SoftFileLease

from patcher_pl.cli.main import run_function
from patcher_pl.jobs import Fit, lock
from patcher_pl.jobs.lock import LOCK, InUseError, held
from tests.commands import cli, sft_settings, write_inputs, write_yaml

HOLDS = """
import pathlib, sys, time
from patcher_pl.jobs.lock import held
with held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE_S", 0.2)


@pytest.fixture
def holder(tmp_path):
    """Another process that works in `tmp_path / "run"`."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_the_second_is_refused_and_the_dead_one_succeeded(tmp_path, holder):
    """Wrong if two runs wrote over each other, or a killed one had to be cleaned up by hand."""
    root = tmp_path / "run"
    with (
        pytest.raises(InUseError, match=rf"in use by process {holder.pid} on \S+\. Wait"),
        held(root),
    ):
        pass
    holder.kill()
    holder.wait()
    with held(root):
        pass
    assert list(root.iterdir()) == []


def owned_elsewhere(root, monkeypatch, silence_s):
    """Leaves the lock of a process on another machine, last renewed so long ago."""
    monkeypatch.setattr(lock, "_LEASE_S", 0.5)
    monkeypatch.setattr(lock, "_RENEWED_EVERY_S", 0.1)
    root.mkdir()
    lease = SoftFileLease(root / LOCK, lease_duration=0.5)
    lease.acquire()
    marker = (root / LOCK).read_text()
    lease.release()
    lines = ["host=node7" if line.startswith("host=") else line for line in marker.splitlines()]
    (root / LOCK).write_text("\n".join(lines) + "\n")
    then = time.time() - silence_s
    os.utime(root / LOCK, (then, then))


def test_an_owner_elsewhere_counts_as_alive_while_it_says_so(tmp_path, monkeypatch):
    owned_elsewhere(tmp_path / "run", monkeypatch, silence_s=0)
    with pytest.raises(InUseError, match=r"in use by process \d+ on node7"), held(tmp_path / "run"):
        pass


@pytest.mark.parametrize("why", ["silent", "requeued", "part"])
def test_an_owner_elsewhere_that_is_silent_is_succeeded(tmp_path, monkeypatch, caplog, why):
    """Wrong if a job that an engine or the queue begins again could not go on on another machine."""
    owned_elsewhere(tmp_path / "run", monkeypatch, silence_s=60 if why == "silent" else 0)
    if why == "requeued":
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with held(tmp_path / "run", is_part=why == "part"):
        assert "on node7 holds it" in caplog.text
        assert "node7" not in (tmp_path / "run" / LOCK).read_text()


def test_commands_refuse_a_directory_that_is_in_use(tmp_path):
    """Wrong if two commands both said "Written"."""
    ran = []

    def command(run_dir: str) -> None:
        ran.append(run_dir)

    inputs = write_inputs(tmp_path)
    config = write_yaml(tmp_path / "config.yaml", sft_settings(inputs))
    with held(tmp_path / "run"):
        (tmp_path / "run" / "results.json").write_text("{}")
        said = cli("fit", "--config", config, "--run_dir", tmp_path / "run", "--overwrite", "true")
        with pytest.raises(InUseError):
            run_function("sweep", command, ["--run_dir", str(tmp_path / "run")])
    assert said.status == 2
    assert f"--run_dir {tmp_path / 'run'} is in use by process {os.getpid()}" in said.err
    assert (tmp_path / "run" / "results.json").exists()
    assert ran == []
    run_function("sweep", command, ["--run_dir", str(tmp_path / "run")])
    run_function("sweep", command, ["--run_dir", str(tmp_path / "other")])
    assert ran == [str(tmp_path / "run"), str(tmp_path / "other")]
    assert not (tmp_path / "other").exists(), "a command that did nothing leaves nothing"


def test_a_run_of_a_sweep_leaves_alone_what_another_fit_is_working_in(tmp_path):
    (tmp_path / "base.yaml").write_text("{}")
    fit = Fit.plan(tmp_path / "run", tmp_path / "base.yaml", {})
    with held(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
        fit.perform("auto")
    assert (tmp_path / "run" / "config.yaml").exists()
    assert not fit.is_done
    assert "is in use by process" in fit.log.read_text()

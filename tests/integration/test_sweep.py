"""The `sweep` command: every variant and seed once, whatever happens to the others."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from patcher_pl.cli.sweep import run_sweep
from patcher_pl.errors import PatcherError
from patcher_pl.jobs import InProcess, fit
from patcher_pl.supervision import SUPERVISED
from tests.commands import ROOT, cli, redteam_settings, sft_settings, write_yaml


@pytest.mark.long
def test_a_sweep_reports_what_failed_and_repeats_only_that(inputs, tmp_path, monkeypatch):
    """Wrong if a night's runs were lost to one bad setting."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    settings = sft_settings(inputs) | {"redteam": redteam_settings(inputs)}
    settings["trainer"]["max_steps"] = 2
    write_yaml(tmp_path / "base.yaml", settings)
    content = {
        "base": "base.yaml",
        "seeds": [4],
        "variants": {
            "fast": {"model.init_args.optimizer.init_args.lr": 1e-2},
            "broken": {"data.batch_size": 0},
        },
    }
    config = write_yaml(tmp_path / "sweep.yaml", content)
    run_dir = tmp_path / "sweep"
    said = cli("sweep", "--config", config, "--run_dir", run_dir)
    assert said.status == 2
    log = run_dir / "broken" / "seed-4" / "log.txt"
    assert "1 of 2 runs failed" in said.err
    assert str(log) in said.err
    assert "fast" not in said.err
    assert "SafetyDataModule.batch_size must be >= 1, got 0" in log.read_text()
    curves = json.loads((run_dir / "results.json").read_text())["curves"]
    assert [(curve["seed"], curve["train_seed"]) for curve in curves] == [(4, 4)]
    assert (run_dir / "asr.png").exists()

    fast = run_dir / "fast" / "seed-4"
    marker, model = fast / "run.json", fast / "model" / "model.safetensors"
    before = marker.stat().st_mtime_ns, model.stat().st_mtime_ns
    content["variants"]["broken"] = {"data.batch_size": 2}
    said = cli("sweep", "--config", write_yaml(config, content), "--run_dir", run_dir).expect(0)
    assert "2 runs, 1 done already" in said.out
    assert (marker.stat().st_mtime_ns, model.stat().st_mtime_ns) == before
    curves = json.loads((run_dir / "results.json").read_text())["curves"]
    # Wrong if the report took variants for seeds, and averaged over them.
    assert [curve["defense"] for curve in curves] == ["sft (fast)", "sft (broken)"]

    said = cli("sweep", "--config", config, "--run_dir", run_dir).expect(0)
    assert "2 runs, 2 done already" in said.out
    assert json.loads((run_dir / "results.json").read_text())["curves"] == curves


class Recorder:
    """Stands for processes: writes down their command lines and leaves a checkpoint."""

    def __init__(self, status):
        self.status = status
        self.commands = []
        self.stdin = io.BytesIO()

    def __call__(self, command, *, env, stdin, **_):
        assert env[SUPERVISED]
        assert stdin == subprocess.PIPE
        self.commands.append(command)
        checkpoints = Path(command[command.index("--run_dir") + 1]) / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        (checkpoints / "last.ckpt").touch()
        return self

    def wait(self):
        return self.status

    def terminate(self):
        raise AssertionError


def replace_processes(monkeypatch, recorder):
    stand_in = SimpleNamespace(Popen=recorder, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(fit, "subprocess", stand_in)


def test_a_run_is_resumed_with_its_own_settings_only(inputs, tmp_path, monkeypatch):
    """Wrong if the checkpoint of a run passed as the outcome of settings that came later."""
    base = write_yaml(tmp_path / "base.yaml", sft_settings(inputs))
    interrupted = Recorder(status=143)
    replace_processes(monkeypatch, interrupted)
    for settings in ({"trainer.max_steps": 2}, {"trainer.max_steps": 2}, {"trainer.max_steps": 3}):
        with pytest.raises(PatcherError, match="1 of 1 runs failed"):
            run_sweep(base, {"one": settings}, tmp_path / "sweep", engine=InProcess())
    how = [{"--ckpt_path=last", "--overwrite=true"} & set(line) for line in interrupted.commands]
    assert how == [{"--overwrite=true"}, {"--ckpt_path=last"}, {"--overwrite=true"}]


def test_settings_reach_fit_as_they_were_written(inputs, tmp_path, monkeypatch):
    base = write_yaml(tmp_path / "base.yaml", sft_settings(inputs))
    failing = Recorder(status=1)
    replace_processes(monkeypatch, failing)
    settings = {"a": None, "b": True, "c": [1, None], "d": {"e": False}, "f": "x"}
    with pytest.raises(PatcherError):
        run_sweep(base, {"one": settings}, tmp_path / "sweep", engine=InProcess())
    told = ("--a=null", "--b=true", "--c=[1, null]", '--d={"e": false}', "--f=x")
    assert set(told) <= set(failing.commands[0])


def test_a_run_ends_with_the_process_that_started_it(inputs, tmp_path):
    """Wrong if a sweep that is killed left runs behind, which the next one would run beside."""
    settings = sft_settings(inputs)
    settings["trainer"]["max_steps"] = 10**6
    config = write_yaml(tmp_path / "base.yaml", settings)
    command = [sys.executable, "-m", "patcher_pl", "fit", "--config", str(config)]
    process = subprocess.Popen(
        [*command, "--run_dir", str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, SUPERVISED: "1"},
        cwd=ROOT,
    )
    process.stdin.close()  # As the system does for a process that dies.
    assert process.wait(timeout=60) == -signal.SIGKILL


def test_a_sweep_over_nothing_is_refused(inputs, tmp_path):
    base = write_yaml(tmp_path / "base.yaml", sft_settings(inputs))
    said = cli("sweep", "--base", base, "--variants", "{}", "--run_dir", tmp_path / "sweep")
    assert said.status == 2
    assert "variants: must name at least one variant" in said.err

"""The red team's command is killed in the middle: it leaves nobody behind and repeats nothing."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from patcher_pl.reports import Results
from tests.commands import ROOT, cli, command_line, redteam_settings, write_yaml

TIMEOUT_S = 240


def wait_for(condition, what: str) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


def descendants(process_id: int) -> list[int]:
    """Children, their children, and so on."""
    threads = Path(f"/proc/{process_id}/task").glob("*/children")  # Whichever started them.
    found = [int(child) for thread in threads for child in thread.read_text().split()]
    return found + [below for child in found for below in descendants(child)]


def is_running(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.long
def test_killed_in_the_middle_it_goes_on_and_repeats_no_finished_attack(inputs, tmp_path):
    team = redteam_settings(inputs) | {"seeds": list(range(6))}
    team["attacks"][0]["init_args"]["attack_steps"] = [0, 40]
    model = str(inputs / "model")
    config = write_yaml(
        tmp_path / "redteam.yaml",
        {
            "redteam": team,
            "models": [{"defense": "sft", "path": model}, {"defense": "other", "path": model}],
            "engine": {
                "class_path": "patcher_pl.redteam.engines.Processes",
                "init_args": {"num_processes": 2},
            },
            "device": "cpu",
            "num_threads": 1,
        },
    )
    run_dir = tmp_path / "run"

    def finished() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (run_dir / "cells").rglob("*.json")}

    with (tmp_path / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            command_line("redteam", "--config", config, "--run_dir", run_dir),
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )
    try:
        wait_for(lambda: len(finished()) >= 2, (tmp_path / "log.txt").read_text())
        workers = descendants(process.pid)
        assert workers
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_for(lambda: not any(map(is_running, workers)), "workers outlived the command")
    kept = finished()
    assert 2 <= len(kept) < 12, "killed in the middle"

    cli("redteam", "--config", config, "--run_dir", run_dir).expect(0)
    after = finished()
    assert len(after) == 12
    assert after.items() >= kept.items(), "a finished attack was repeated"
    curves = Results.load(run_dir / "results.json").curves
    assert [(curve.defense, curve.seed) for curve in curves] == [
        (defense, seed) for defense in ("sft", "other") for seed in range(6)
    ]
    assert all(curve.error is None for curve in curves)

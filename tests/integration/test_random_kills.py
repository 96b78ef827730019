"""Twenty SIGKILLs at random moments: the run goes on, by itself or by its command, to the same end."""

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.commands import ROOT, cli, command_line, patcher_settings, write_yaml
from tests.integration.test_concurrent import (
    assert_same_weights,
    attackers_of,
    concurrent_settings,
    weights,
)

NUM_KILLS = 20
NUM_STEPS = 200
TIMEOUT_S = 1500


class Run:
    """A `fit` in a process of its own, started again wherever it was killed."""

    def __init__(self, config: Path, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir
        self.process: subprocess.Popen | None = None
        self.num_starts = 0

    def ensure_started(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        if self.process is not None:
            assert self.process.returncode == -signal.SIGKILL, self.log
        # Killed before its first checkpoint, it has nothing to go on from.
        saved = (self.run_dir / "checkpoints" / "last.ckpt").exists()
        how = ("--ckpt_path", "last") if saved else ("--overwrite", "true")
        command = command_line("fit", "--config", self.config, "--run_dir", self.run_dir, *how)
        self.num_starts += 1
        with (self.run_dir.parent / "fit.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    @property
    def step(self) -> int:
        saved = [path.stem for path in (self.run_dir / "checkpoints").glob("step-*.ckpt")]
        return max((int(stem.removeprefix("step-")) for stem in saved), default=0)

    @property
    def log(self) -> str:
        return (self.run_dir.parent / "fit.log").read_text()

    def kill(self, victim: str) -> None:
        victims = attackers_of(self.run_dir) if victim != "defender" else []
        if victim != "attacker":
            assert self.process is not None
            victims.append(self.process.pid)
        for process in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if victim != "attacker":
            assert self.process is not None
            self.process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_a_run_survives_random_kills(inputs, tmp_path, seed):
    """In lock step, so that the end can be compared with that of the undisturbed, sequential run."""
    options = {
        "checkpoint_every_n_steps": 2,
        "trainer": {**patcher_settings(inputs)["trainer"], "max_steps": NUM_STEPS},
    }
    undisturbed = write_yaml(tmp_path / "undisturbed.yaml", patcher_settings(inputs) | options)
    cli("fit", "--config", undisturbed, "--run_dir", tmp_path / "undisturbed").expect(0)
    settings = concurrent_settings(inputs, max_failures=100) | options
    run = Run(write_yaml(tmp_path / "config.yaml", settings), tmp_path / "run")

    chance = random.Random(seed)
    moments = sorted(chance.sample(range(0, NUM_STEPS - 10), NUM_KILLS))
    deadline = time.monotonic() + TIMEOUT_S
    killed = []
    try:
        for moment in moments:
            while run.step < moment:
                run.ensure_started()
                assert time.monotonic() < deadline, run.log
                time.sleep(0.005)
            run.ensure_started()
            # Anywhere between two checkpoints: in a step, an attack, a snapshot or a start.
            time.sleep(chance.uniform(0, 0.3))
            killed.append(chance.choice(["defender", "attacker", "both"]))
            run.kill(killed[-1])
        run.ensure_started()
        assert run.process is not None
        assert run.process.wait(max(0.0, deadline - time.monotonic())) == 0, run.log
    finally:
        if run.process is not None:
            run.process.kill()
            run.process.wait()
    assert len(killed) == NUM_KILLS
    assert set(killed) == {"defender", "attacker", "both"}
    assert run.num_starts > killed.count("defender")
    assert_same_weights(weights(run.run_dir), weights(tmp_path / "undisturbed"))
    assert not attackers_of(run.run_dir)
    mailboxes = re.findall(r"ready at\s+(\S+)\.", (run.run_dir / "attackers" / "0.log").read_text())
    assert mailboxes
    assert not [path for path in mailboxes if Path(path).exists()]

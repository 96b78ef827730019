"""What a user brings along."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from patcher_pl.jobs import InProcess, fit
from tests.commands import cli, write_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder with `model/`, `safe.jsonl` and `unsafe.jsonl`."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def fits_in_this_process(monkeypatch):
    """Runs of `fit` without the seconds that two processes for each need to start.

    Same command lines, logs and exit statuses; `test_sweep` and `test_jobs_kill` start processes.
    """

    def run(command, *, stdout, **_):
        assert command[:3] == [sys.executable, "-m", "patcher_pl"]
        said = cli(*command[3:])
        stdout.write(f"{said.out}{said.err}".encode())
        ended = SimpleNamespace(close=lambda: None)
        return SimpleNamespace(stdin=ended, wait=lambda: said.status)

    stand_in = SimpleNamespace(Popen=run, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(fit, "subprocess", stand_in)
    monkeypatch.setattr(fit, "choose_engine", lambda *_: InProcess())

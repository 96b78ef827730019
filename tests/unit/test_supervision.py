"""If these fail, processes are left behind, or one that dies takes the run with it."""

import os
import subprocess
import sys
import time

import pytest

from patcher_pl import supervision
from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.supervision import Program, Supervisor

SLEEP = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
FAIL = "print('the reason'); raise SystemExit({status})"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(supervision, "FIRST_DELAY_S", 0.01)


def job(tmp_path, program, achieved=lambda: 0):
    command = [sys.executable, "-c", program]
    log = tmp_path / "logs" / "job.log"
    return Program(
        name="job", command=command, log=log, environment={"X": "1"}, num_achieved=achieved
    )


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def until(condition, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def said(tmp_path):
    log = tmp_path / "logs" / "job.log"
    return log.read_text() if log.exists() else ""


@pytest.mark.parametrize("program", [SLEEP, STUBBORN], ids=["polite", "stubborn"])
def test_no_process_outlives_the_block(tmp_path, monkeypatch, program):
    monkeypatch.setattr(supervision, "STOP_TIMEOUT_S", 0.5)
    with pytest.raises(KeyboardInterrupt), Supervisor([job(tmp_path, program)], 3) as supervisor:
        until(lambda: "up" in said(tmp_path))
        (process,) = supervisor.process_ids
        raise KeyboardInterrupt
    assert not is_running(process)


def test_a_job_that_is_killed_is_restarted(tmp_path):
    with Supervisor([job(tmp_path, SLEEP)], 3) as supervisor:
        (first,) = supervisor.process_ids
        os.kill(first, 9)
        until(lambda: supervisor.check() or supervisor.num_restarts)
        (second,) = supervisor.process_ids
        assert second != first
        assert is_running(second)


def test_it_gives_up_after_failures_in_a_row_and_says_why(tmp_path):
    with (
        Supervisor([job(tmp_path, FAIL.format(status=1))], 3) as supervisor,
        pytest.raises(PatcherError, match=r"job failed 3 times in a row .* the reason"),
    ):
        until(lambda: supervisor.check())
    assert supervisor.num_restarts == 2


def test_failures_with_progress_in_between_are_not_in_a_row(tmp_path):
    achieved = iter(range(1, 100))
    failing = job(tmp_path, FAIL.format(status=1), lambda: next(achieved))
    with Supervisor([failing], 2) as supervisor:
        until(lambda: supervisor.check() or supervisor.num_restarts == 4)


def test_what_can_never_work_is_not_repeated(tmp_path):
    with (
        Supervisor([job(tmp_path, FAIL.format(status=2))], 5) as supervisor,
        pytest.raises(ConfigError, match="job cannot run: the reason"),
    ):
        until(lambda: supervisor.check())
    assert supervisor.num_restarts == 0


def test_delays_double_up_to_half_a_minute():
    assert [supervision.delay_s(count) for count in (1, 2, 3)] == [0.01, 0.02, 0.04]
    assert supervision.delay_s(50) == 30


PARENT = """
import pathlib, sys, time
from patcher_pl.supervision import Program, Supervisor
child = "from patcher_pl.supervision import end_with_parent; import pathlib, time;" \\
    "end_with_parent(lambda: pathlib.Path({cleaned!r}).touch()); print('up', flush=True); time.sleep(600)"
log = pathlib.Path(sys.argv[1])
job = Program(name="job", command=[sys.executable, "-c", child.format(cleaned=sys.argv[2])], log=log,
          environment={{}}, num_achieved=lambda: 0)
with Supervisor([job], 3) as supervisor:
    print(*supervisor.process_ids, flush=True)
    time.sleep(600)
"""


def test_a_job_cleans_up_and_ends_when_its_parent_is_killed(tmp_path):
    """SIGKILL, so that the parent itself can do nothing any more."""
    log, cleaned = tmp_path / "logs" / "job.log", tmp_path / "cleaned"
    program = PARENT.replace("{{}}", "{}")
    command = [sys.executable, "-c", program, str(log), str(cleaned)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        child = int(parent.stdout.readline())
        until(lambda: "up" in said(tmp_path))
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    until(lambda: not is_running(child))
    assert cleaned.exists()

"""One rule for resuming, failures and signals, whatever the work is."""

import os
import signal
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from patcher_pl.errors import ConfigError, PatcherError, RunInterrupted
from patcher_pl.jobs import Fit, InProcess, Job, Processes, choose_engine, fit, run_missing


@dataclass(frozen=True)
class Said:
    word: str
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Saying(Job[Said]):
    """Writes a word, or does what else it is told."""

    word: str

    key: ClassVar[str] = "said"

    def perform(self, device):
        if self.word == "bug":
            raise KeyError("a spoon")
        if self.word == "hopeless":
            raise ConfigError("no spoons at all")
        if self.word == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        self.write({"word": f"{self.word} on {device}"})

    def fail(self, reason):
        self.write({"word": "", "error": reason})

    def parse(self, content):
        return Said(**content)


def saying(folder, *words):
    return [Saying(path=folder / f"{word}.json", digest="1", word=word) for word in words]


ENGINES = [InProcess(), Processes(num_processes=1, devices=["cpu"])]


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_done_is_not_repeated_and_what_failed_is(tmp_path, engine, capsys):
    jobs = saying(tmp_path, "bug", "yes")
    (failed,) = run_missing(jobs, engine, "cpu", "words")
    assert failed.load() == Said("", "KeyError: 'a spoon'")
    assert jobs[1].load() == Said("yes on cpu")
    before = jobs[1].path.stat().st_mtime_ns
    assert run_missing(jobs, engine, "cpu", "words") == [failed]
    assert "2 words, 1 done already." in capsys.readouterr().out
    assert jobs[1].path.stat().st_mtime_ns == before
    assert replace(jobs[1], digest="2").load() is None, "an outcome of other settings"


@pytest.mark.parametrize("engine", ENGINES)
def test_what_all_would_meet_stops_them_all(tmp_path, engine):
    with pytest.raises(PatcherError, match="no spoons at all"):
        run_missing(saying(tmp_path, "hopeless", "yes"), engine, "cpu", "words")
    assert not list(tmp_path.iterdir())


def test_a_signal_ends_the_job_under_way_and_keeps_the_others(tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    jobs = saying(tmp_path, "yes", "signal", "no")
    with pytest.raises(RunInterrupted, match=r"finished words .* are kept") as stopped:
        run_missing(jobs, InProcess(), "cpu", "words")
    assert stopped.value.signal == signal.SIGTERM
    assert [job.is_done for job in jobs] == [True, False, False]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_broken_file_is_named(tmp_path):
    (job,) = saying(tmp_path, "yes")
    for content in ("{", "[]", '{"said": {}, "fingerprint": "1"}'):
        job.path.write_text(content)
        with pytest.raises(PatcherError, match=r"yes\.json: this is no outcome .* Delete it"):
            job.load()


def test_a_measured_process_is_not_shared(tmp_path, monkeypatch):
    """Wrong if the peak memory of one estimator were that of an earlier one."""
    monkeypatch.setattr(Saying, "wants_own_process", True)
    with pytest.raises(ConfigError, match="words measure the memory of a process of their own"):
        run_missing(saying(tmp_path, "yes"), InProcess(), "cpu", "words")


def test_processes_are_numbered_once():
    assert choose_engine(None, 3) == Processes(num_processes=3)
    with pytest.raises(ConfigError, match=r"Set engine\.init_args\.num_processes"):
        choose_engine(Processes(), 3)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "base.yaml").write_text("{}")
    return Fit.plan(tmp_path / "run", tmp_path / "base.yaml", {})


def test_a_checkpoint_of_other_settings_is_gone_before_the_run_is_marked(run, monkeypatch):
    """Wrong if a run that was killed right after its start went on from the wrong weights."""
    checkpoint = run.run_directory.checkpoints / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    replace(run, digest="earlier").write(False)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fit.subprocess, "Popen", killed)
    with pytest.raises(KeyboardInterrupt):
        run.perform("auto")
    assert run.load() is not None
    assert not checkpoint.exists()


@pytest.mark.parametrize(
    ("device", "visible", "given"),
    [
        ("cuda:1", None, "1"),
        ("cuda:1", "4,6", "6"),
        ("auto", "4,6", "4,6"),
        ("cpu", None, None),
    ],
)
def test_a_run_sees_the_device_that_it_was_dealt(run, monkeypatch, device, visible, given):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert run._environment(device, alone=True).get("CUDA_VISIBLE_DEVICES") == given

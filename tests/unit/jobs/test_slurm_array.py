"""What `SlurmArray` submits and when, on a SLURM that is made up: tasks end as the clock goes on."""

import signal
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from patcher_pl.cli.ablate import run_ablate
from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.jobs import Fit, SlurmArray, fit, run_missing, slurm_array
from tests.unit.jobs.test_jobs import saying


class RefusedError(Exception):
    """What submitit raises where sbatch does."""


@dataclass(eq=False)
class Task:
    """A task as submitit shows it; `poll`s until it ends, for ever where it is lost."""

    cluster: "Slurm"
    attempt: Any
    job_id: str
    left: float
    num_tasks: int = 1
    outcome: Any = None

    @property
    def paths(self) -> Any:
        folder = self.cluster.folder
        result = folder / f"{self.job_id}_result.pkl"
        return SimpleNamespace(folder=folder, result_pickle=result, stderr=folder / "stderr")

    def task(self, number: int) -> "Task":
        return self

    def exception(self) -> None:
        return None

    def results(self) -> list[Any]:
        return [self.outcome]

    def cancel(self, *, check: bool) -> None:
        self.cluster.cancelled.append(self.job_id)
        self.cluster.queued.remove(self)


@dataclass(eq=False)
class Slurm:
    """Stands for submitit, `squeue` and the clock."""

    folder: Path
    slow: str = ""
    lost: str = ""
    takes: int = 1000
    now: float = 0.0
    arrays: list[int] = field(default_factory=list)
    queued: list[Task] = field(default_factory=list)
    most: int = 0
    cancelled: list[str] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)

    core = SimpleNamespace(utils=SimpleNamespace(FailedJobError=RefusedError))

    def SlurmExecutor(self, **_: Any) -> "Slurm":  # noqa: N802 (submitit's name)
        return self

    def update_parameters(self, **parameters: Any) -> None:
        self.parameters = parameters

    def submit_array(self, attempts: list[Any]) -> list[Task]:
        if len(self.queued) + len(attempts) > self.takes:
            raise RefusedError("sbatch: error: Batch job submission failed: too many jobs")
        lengths = {self.slow: 50, self.lost: float("inf")}
        tasks = [
            Task(self, one, f"{len(self.arrays)}_{n}", lengths.get(one.job.word, 1 + n % 2))
            for n, one in enumerate(attempts)
        ]
        self.arrays.append(len(attempts))
        self.queued += tasks
        self.most = max(self.most, len(self.queued))
        return tasks

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for task in list(self.queued):
            task.left -= 1
            if task.attempt.job.word == self.lost:
                self.queued.remove(task)
            elif task.left <= 0:
                task.outcome = task.attempt()
                task.paths.result_pickle.touch()
                self.queued.remove(task)

    def squeue(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(returncode=0, stdout="\n".join(task.job_id for task in self.queued))


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    made_up = Slurm(tmp_path)
    made_up.SlurmExecutor.__func__.affinity = lambda: 2  # type: ignore[attr-defined]
    monkeypatch.setattr(slurm_array, "_imported", lambda: made_up)
    monkeypatch.setattr(slurm_array.subprocess, "run", made_up.squeue)
    clock = SimpleNamespace(sleep=made_up.sleep, monotonic=lambda: made_up.now)
    monkeypatch.setattr(slurm_array, "time", clock)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    yield made_up
    for number, handler in handlers.items():
        signal.signal(number, handler)


def words(folder, num):
    return saying(folder, *(f"word-{number}" for number in range(num)))


def test_a_slow_task_holds_nothing_back(slurm, tmp_path):
    """Wrong if the next array waited for the whole of the last one, or all were submitted at once."""
    slurm.slow = "word-0"
    jobs = words(tmp_path, 40)
    last = []
    collect = slurm_array._Task.collect

    def noted(task):
        last.append(task.job.word)
        collect(task)

    slurm_array._Task.collect = noted
    try:
        assert run_missing(jobs, SlurmArray(num_at_once=5), "cpu", "words") == []
    finally:
        slurm_array._Task.collect = collect
    assert slurm.most == 5
    assert sum(slurm.arrays) == 40
    assert last[-1] == "word-0"
    assert all(job.is_done for job in jobs)


def test_more_than_an_array_can_hold_are_several(slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm_array, "_MAX_ARRAY", 3)
    run_missing(words(tmp_path, 7), SlurmArray(num_at_once=7), "cpu", "words")
    assert slurm.arrays[:2] == [3, 3]
    assert slurm.most <= 7


def test_a_lost_task_is_listed_and_tried_again(slurm, tmp_path):
    slurm.lost = "word-1"
    jobs = words(tmp_path, 3)
    (failed,) = run_missing(jobs, SlurmArray(), "cpu", "words")
    assert failed is jobs[1]
    assert "SLURM task 0_1 ended without a result; see " in failed.load().error
    slurm.lost = ""
    assert run_missing(jobs, SlurmArray(), "cpu", "words") == []
    assert slurm.arrays == [3, 1], "what is done is not submitted again"


def test_a_task_that_was_done_before_it_was_lost_is_done(slurm, tmp_path):
    (job,) = words(tmp_path, 1)
    slurm.lost = job.word
    engine = SlurmArray()
    submit = slurm.submit_array

    def done_at_once(attempts):
        attempts[0].job.perform("cpu")
        return submit(attempts)

    slurm.submit_array = done_at_once
    assert run_missing([job], engine, "cpu", "words") == []


def test_what_all_would_meet_cancels_the_others(slurm, tmp_path):
    slurm.slow = "word-0"
    jobs = [*words(tmp_path, 2), *saying(tmp_path, "hopeless")]
    with pytest.raises(PatcherError, match="no spoons at all"):
        run_missing(jobs, SlurmArray(num_at_once=2), "cpu", "words")
    assert slurm.cancelled == ["0_0"]


def test_a_refusal_of_slurm_is_one_message(slurm, tmp_path):
    slurm.takes, slurm.slow = 2, "word-0"
    with pytest.raises(ConfigError, match=r"SLURM takes no more tasks: .*too many jobs\. .* lower"):
        run_missing(words(tmp_path, 9), SlurmArray(num_at_once=3), "cpu", "words")


def test_several_processes_have_a_job_and_gpus_each(slurm, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"tasks_per_node must be 1 for words, got 2"):
        run_missing(words(tmp_path, 1), SlurmArray(tasks_per_node=2), "cpu", "words")
    kind = type(words(tmp_path, 1)[0])
    monkeypatch.setattr(kind, "is_shareable", True)
    monkeypatch.setattr(kind, "perform_together", lambda job, device: job.perform(device))
    engine = SlurmArray(tasks_per_node=2, num_gpus=4, num_cpus=3)
    assert run_missing(words(tmp_path, 1), engine, "cpu", "words") == []
    given = slurm.parameters
    assert (given["ntasks_per_node"], given["gpus_per_node"], given["cpus_per_task"]) == (2, 8, 3)
    assert "--kill-on-bad-exit=1" in given["srun_args"]


def test_estimates_are_for_one_process(tmp_path):
    """Wrong if the model were trained before that is said."""
    with pytest.raises(ConfigError, match=r"tasks_per_node must be 1 for estimates"):
        run_ablate("base.yaml", None, tmp_path, engine=SlurmArray(tasks_per_node=2))


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "base.yaml").write_text("{}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    return Fit.plan(tmp_path / "run", tmp_path / "base.yaml", {})


class Started:
    """A process that has ended."""

    def __init__(self, command, **_):
        self.stdin = SimpleNamespace(close=lambda: None)
        Started.command = command

    def wait(self):
        return Started.status


def test_the_first_process_says_where_all_begin(run, monkeypatch):
    """Wrong if one went on from a checkpoint that another had deleted."""
    waits = []

    def first_decides(_):
        waits.append(1)
        monkeypatch.setenv("SLURM_PROCID", "0")
        run._begin()
        monkeypatch.setenv("SLURM_PROCID", "1")

    checkpoint = run.run_directory.checkpoints / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    run.write(False, launch="6.0.0", goes_on=False)  # Of an earlier start.
    monkeypatch.setattr(fit.time, "sleep", first_decides)
    monkeypatch.setattr(fit.subprocess, "Popen", Started)
    monkeypatch.setenv("SLURM_PROCID", "1")
    Started.status = 0
    run.perform_together("cpu")
    assert waits == [1]
    assert "--ckpt_path=last" in Started.command
    assert not run.is_done, "that is for the first to say"


@pytest.mark.parametrize(
    ("status", "ends_others"), [(0, False), (143, False), (2, True), (-9, True)]
)
def test_a_run_that_failed_ends_the_other_processes(run, monkeypatch, status, ends_others):
    monkeypatch.setattr(fit.subprocess, "Popen", Started)
    monkeypatch.setenv("SLURM_PROCID", "0")
    Started.status = status
    if ends_others:
        with pytest.raises(SystemExit):
            run.perform_together("cpu")
    else:
        run.perform_together("cpu")
    assert run.is_done == (status == 0)

"""`SlurmArray` on a real SLURM."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from patcher_pl.jobs import SlurmArray
from patcher_pl.reports import Results
from tests.commands import (
    ROOT,
    command_line,
    end,
    patcher_settings,
    redteam_settings,
    sft_settings,
    write_inputs,
    write_yaml,
)
from tests.slurm.cluster import NEEDS_SLURM, Cluster
from tests.slurm.red_teams import attack_settings, measured

pytestmark = NEEDS_SLURM
pytest.importorskip("submitit")

STRATEGY = {
    "trainer.devices": 2,
    "trainer.strategy": {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
    },
    # Half of a step's rows each.
    "data.batch_size": 2,
}
# Long enough for a task to be cancelled in the middle of it.
NUM_EVALUATIONS = 500


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    for name, settings in (("sft", sft_settings(folder)), ("patcher", patcher_settings(folder))):
        settings |= {"num_threads": 1, "checkpoint_every_n_steps": 1}
        write_yaml(folder / f"{name}.yaml", settings)
    write_yaml(folder / "redteam.yaml", redteam_settings(folder))
    return folder


def array(logs: Path, **options: Any) -> dict[str, Any]:
    """The engine, as configurations name it."""
    chosen = {"num_cpus": 1, "timeout_min": 10, "logs": str(logs), **options}
    return {"class_path": f"{SlurmArray.__module__}.{SlurmArray.__name__}", "init_args": chosen}


def begin(cluster: Cluster, inputs: Path, run: str, command: str, content: Any) -> subprocess.Popen:
    """Starts a command; what it says goes to a file."""
    config = write_yaml(inputs / f"{run}.yaml", content)
    with (inputs / f"{run}.log").open("ab") as log:
        return subprocess.Popen(
            command_line(command, "--config", config, "--run_dir", inputs / run),
            cwd=ROOT,
            env=cluster.environment,
            stdout=log,
            stderr=log,
        )


def perform(cluster: Cluster, inputs: Path, run: str, command: str, content: Any) -> None:
    """Starts a command and waits for it."""
    end(begin(cluster, inputs, run, command, content), inputs / f"{run}.log")


def comparison(engine: Any, **options: Any) -> dict[str, Any]:
    """Two defenses, one setting and one model each."""
    return {
        "max_gradient_evaluations": NUM_EVALUATIONS,
        "seeds": [0],
        "redteam": "redteam.yaml",
        "selection": {"redteam": "redteam.yaml", "num_trials": 1, "seeds": [9]},
        "defenses": {"sft": {"fit": "sft.yaml"}, "mine": {"fit": "patcher.yaml"}},
        "options": {"trainer.max_steps": -1, **options},
        "engine": engine,
    }


def compared(run_dir: Path) -> Any:
    """Trials, costs, curves and weights."""
    found = json.loads((run_dir / "comparison.json").read_text())
    weights = {
        path.relative_to(run_dir): path.read_bytes() for path in run_dir.rglob("model.safetensors")
    }
    assert len(weights) == 4
    curves = Results.load(run_dir / "results.json").curves
    return found["trials"], found["costs"], curves, weights


def test_a_comparison_goes_on_where_a_task_was_cancelled(cluster, inputs):
    """Wrong if a figure depended on who ran it, or what the others found were lost."""
    here = {"class_path": "patcher_pl.jobs.InProcess"}
    perform(cluster, inputs, "here", "compare", comparison(here))
    engine = array(inputs / "compare-logs")
    process = begin(cluster, inputs, "tasks", "compare", comparison(engine))
    runs = inputs / "tasks" / "search"
    cluster.wait_for(lambda: list(runs.glob("mine/**/step-*.ckpt")), "checkpoint")
    # The second of an array of two: settings are tried in the order of the defenses.
    queued = cluster.run("squeue", "--noheader", "--array", "--format=%i").split()
    cluster.run("scancel", max(queued))
    said = end(process, inputs / "tasks.log", status=2)
    assert "mine: every trial failed" in said
    done = {path: path.stat().st_mtime_ns for path in runs.glob("sft/**/run.json")}
    perform(cluster, inputs, "tasks", "compare", comparison(engine))
    assert {path: path.stat().st_mtime_ns for path in done} == done, "what is done is not repeated"
    runs_of_all = [json.loads(path.read_text()) for path in (inputs / "tasks").rglob("run.json")]
    # Of a run that went on from a checkpoint it is not known how long it took.
    assert ["seconds" in run for run in runs_of_all].count(False) == 1
    assert compared(inputs / "tasks") == compared(inputs / "here")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_red_team_as_an_array_finds_what_one_process_finds(cluster, inputs, num_processes):
    """Wrong if a figure depended on who ran it, or on how many did."""
    logs = inputs / f"logs-{num_processes}"
    engine = array(logs, tasks_per_node=num_processes, num_at_once=2 // num_processes)
    runs = [f"{who}-{num_processes}" for who in ("alone", "array")]
    for run, chosen in zip(runs, ({}, {"engine": engine}), strict=True):
        settings = attack_settings(inputs, inputs / "model", inputs / run) | {"dtype": "float64"}
        perform(cluster, inputs, run, "redteam", settings | chosen)
    assert measured(inputs / runs[1]) == measured(inputs / runs[0])
    assert len(list(logs.glob("*_result.pkl"))) == 2 * num_processes


@pytest.mark.parametrize(
    ("how", "num_processes", "reason"),
    [("kill", 1, r"SLURM task .* ended"), ("second", 2, r"^RuntimeError: a spoon$")],
)
def test_a_process_that_dies_is_recorded_and_other_tasks_go_on(
    cluster, inputs, how, num_processes, reason
):
    """Wrong if the command, which has no accounting to ask, or a first process waited for ever."""
    settings = attack_settings(inputs, inputs / "model", inputs / how)
    dying = {"class_path": "tests.red_team_parts.Dying", "init_args": {"how": how}}
    settings["redteam"]["attacks"].append(dying)
    settings["redteam"]["seeds"] = [0]
    settings["engine"] = array(inputs / f"logs-{how}", tasks_per_node=num_processes)
    perform(cluster, inputs, how, "redteam", settings)
    first, second = measured(inputs / how)
    assert first[-1] is None
    assert re.search(reason, second[-1])


def run_again(cluster: Cluster, task: str, num_restarts: int) -> None:
    """Waits until a task is put back, and spares it the two minutes that SLURM lets it wait."""

    def is_back() -> bool:
        found = cluster.job(int(task))
        return (found["JobState"], found["Restarts"]) == ("PENDING", str(num_restarts))

    cluster.wait_for(is_back, "requeued task")
    cluster.run("scontrol", "update", f"jobid={task}", "starttime=now")


def sweep(base: str, engine: Any, **options: Any) -> dict[str, Any]:
    return {"base": base, "variants": {"mine": options}, "engine": engine}


def test_a_run_of_two_processes_is_put_back_and_ends_the_same(cluster, inputs):
    """Wrong if the processes parted ways, or a task that SLURM will run again counted as failed."""
    red_team = str(inputs / "redteam.yaml")
    options = {**STRATEGY, "trainer.max_steps": 100, "redteam": red_team}
    engine = array(inputs / "sweep-logs", tasks_per_node=2)
    content = sweep("patcher.yaml", engine, **options)
    process = begin(cluster, inputs, "put-back", "sweep", content)
    run = inputs / "put-back" / "mine" / "seed-0"
    saved = run / "checkpoints"
    cluster.wait_for(lambda: list(saved.glob("step-*.ckpt")), "checkpoint")
    (task,) = cluster.run("squeue", "--noheader", "--array", "--format=%i").split()
    # As when the time is up.
    cluster.run("scancel", "--signal=USR2", task)
    run_again(cluster, task, 1)
    first = max(saved.glob("step-*.ckpt"))
    cluster.wait_for(
        lambda: max(saved.glob("step-*.ckpt")) > first, "checkpoint after the first end"
    )
    # As when another job takes its place.
    cluster.run("scontrol", "requeue", task)
    run_again(cluster, task, 2)
    end(process, inputs / "put-back.log")
    said = (run / "log.txt").read_text()
    assert "stopped by SIGUSR2" in said
    assert "stopped by SIGTERM" in said
    undisturbed = begin(cluster, inputs, "undisturbed", "sweep", content)
    end(undisturbed, inputs / "undisturbed.log")
    one, other = (
        inputs / name / "mine" / "seed-0" / "model" / "model.safetensors"
        for name in ("put-back", "undisturbed")
    )
    assert one.read_bytes() == other.read_bytes()
    curves = [
        Results.load(inputs / name / "results.json").curves for name in ("put-back", "undisturbed")
    ]
    assert curves[0] == curves[1]

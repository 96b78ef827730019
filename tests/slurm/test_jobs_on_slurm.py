"""The shipped job file on a real SLURM: its time runs out, it is cancelled, its node dies."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from patcher_pl.jobs import SlurmArray
from tests.commands import ROOT, patcher_settings, redteam_settings, write_inputs, write_yaml
from tests.slurm.cluster import PROGRAMS, Cluster

_PATH = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
_MISSING = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(_MISSING), reason=f"apt-get install slurm-wlm munge: {_MISSING}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="SLURM's daemons are started as root"),
]
JOB = ROOT / "configs" / "strategies" / "fsdp2-multinode.sbatch"
TWO_TASKS = ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0")
STRATEGY: dict[str, Any] = {
    "trainer": {
        "accelerator": "cpu",
        "devices": 2,
        "strategy": {
            "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
            "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
        },
    }
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    # Jobs find the interpreter that runs the tests.
    cluster.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    settings = patcher_settings(folder)
    settings["data"]["batch_size"] = 2
    settings["checkpoint_every_n_steps"] = 20
    settings["trainer"]["max_steps"] = NUM_STEPS
    settings["redteam"] = redteam_settings(folder)
    write_yaml(folder / "fit.yaml", settings)
    write_yaml(folder / "strategy.yaml", STRATEGY)
    return folder


# More than what fits into two minutes.
NUM_STEPS = 400


def submit(cluster: Cluster, inputs: Path, run_dir: Path, *options: str) -> int:
    """The shipped job file, for two tasks on a CPU."""
    return cluster.submit(
        *(*TWO_TASKS, *options, f"--output={run_dir}.out", JOB),
        *(inputs / "fit.yaml", run_dir, inputs / "strategy.yaml"),
    )


def finished(cluster: Cluster, job: int, run_dir: Path) -> dict[str, str]:
    """Waits for the end of a job that has to succeed."""
    over = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")
    cluster.wait_for(lambda: cluster.job(job)["JobState"] in over, "end of the job", 900)
    found = cluster.job(job)
    assert found["JobState"] == "COMPLETED", Path(f"{run_dir}.out").read_text()[-6000:]
    return found


def steps_saved(run_dir: Path) -> list[int]:
    saved = (run_dir / "checkpoints").glob("step-*.ckpt")
    return sorted(int(path.stem.removeprefix("step-")) for path in saved)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, inputs: Path) -> Path:
    run_dir = inputs / "undisturbed"
    finished(cluster, submit(cluster, inputs, run_dir), run_dir)
    return run_dir


def assert_same(run_dir: Path, undisturbed: Path) -> None:
    weights = load_file(undisturbed / "model" / "model.safetensors")
    for name, value in load_file(run_dir / "model" / "model.safetensors").items():
        assert (value == weights[name]).all(), name
    assert (run_dir / "results.csv").read_text() == (undisturbed / "results.csv").read_text()


def test_a_job_whose_time_runs_out_is_requeued_and_ends_the_same(cluster, inputs, undisturbed):
    """Wrong if the signal came to nobody, the job were not put back, or a step were lost."""
    run_dir = inputs / "short-of-time"
    # Minutes are the smallest unit, and the signal comes up to a minute early.
    job = submit(cluster, inputs, run_dir, "--time=2", "--signal=USR1@20")
    cluster.wait_for(lambda: int(cluster.job(job)["Restarts"]) == 1, "requeued job")
    cluster.run("scontrol", "update", f"jobid={job}", "timelimit=60")
    found = finished(cluster, job, run_dir)
    assert int(found["Restarts"]) == 1
    said = Path(f"{run_dir}.out").read_text()
    assert f"SLURM job {job} is requeued" in said
    assert_same(run_dir, undisturbed)


def test_a_cancelled_job_has_saved_and_another_goes_on(cluster, inputs, undisturbed):
    run_dir = inputs / "cancelled"
    job = submit(cluster, inputs, run_dir)
    cluster.wait_for(lambda: steps_saved(run_dir), "checkpoint")
    cluster.run("scancel", job)
    cluster.wait_for(lambda: cluster.job(job)["JobState"] == "CANCELLED", "end of the job")
    cluster.wait_for(lambda: cluster.node_state == "idle", "idle node")
    # At the step under way, not at the last one that was due; and it stays cancelled.
    assert steps_saved(run_dir)[-1] % 20 != 0
    assert "requeued" not in Path(f"{run_dir}.out").read_text()
    finished(cluster, submit(cluster, inputs, run_dir), run_dir)
    assert_same(run_dir, undisturbed)


def test_a_job_whose_node_dies_goes_on_when_it_is_back(cluster, inputs, undisturbed):
    run_dir = inputs / "node-lost"
    job = submit(cluster, inputs, run_dir)
    cluster.wait_for(lambda: steps_saved(run_dir), "checkpoint")
    cluster.kill_node()
    cluster.wait_for(lambda: cluster.job(job)["JobState"] == "PENDING", "requeued job")
    cluster.start_node()
    assert int(finished(cluster, job, run_dir)["Restarts"]) == 1
    assert_same(run_dir, undisturbed)


def attack_settings(inputs: Path, model: Path, run_dir: Path) -> dict[str, Any]:
    redteam = redteam_settings(inputs) | {"seeds": [0, 1]}
    common = {"device": "cpu", "num_threads": 1, "redteam": redteam}
    return {"run_dir": str(run_dir), "model": str(model), **common}


def test_a_red_team_of_two_tasks_finds_what_one_process_finds(cluster, inputs):
    """srun starts both, which hold the model together."""
    one = write_yaml(
        inputs / "one.yaml", attack_settings(inputs, inputs / "model", inputs / "alone")
    )
    two = write_yaml(
        inputs / "two.yaml", attack_settings(inputs, inputs / "model", inputs / "together")
    )
    command = ("python", "-m", "patcher_pl", "redteam", "--dtype", "float64", "--config")
    cluster.run("srun", *TWO_TASKS, *command, two)
    cluster.run(*command, one)
    assert measured(inputs / "together") == measured(inputs / "alone")


def test_a_red_team_as_an_array_finds_what_one_process_finds(cluster, inputs):
    """Wrong if a figure depended on who ran it."""
    pytest.importorskip("submitit")
    command = ("python", "-m", "patcher_pl", "redteam", "--config")
    for name in ("alone", "array"):
        settings = attack_settings(inputs, inputs / "model", inputs / f"as-{name}")
        if name == "array":
            chosen = {"num_cpus": 1, "timeout_min": 10, "logs": str(inputs / "logs")}
            engine = f"{SlurmArray.__module__}.{SlurmArray.__name__}"
            settings["engine"] = {"class_path": engine, "init_args": chosen}
        cluster.run(*command, write_yaml(inputs / f"as-{name}.yaml", settings))
    assert measured(inputs / "as-array") == measured(inputs / "as-alone")
    assert len(list((inputs / "logs").glob("*_result.pkl"))) == 2


def test_a_task_that_dies_is_recorded_and_the_others_go_on(cluster, inputs):
    """There is no accounting to ask here; wrong if the command waited for ever."""
    pytest.importorskip("submitit")
    settings = attack_settings(inputs, inputs / "model", inputs / "dying")
    dying = {"class_path": "tests.red_team_parts.Dying", "init_args": {"how": "kill"}}
    settings["redteam"]["attacks"].append(dying)
    settings["redteam"]["seeds"] = [0]
    chosen = {"num_cpus": 1, "timeout_min": 10, "logs": str(inputs / "logs-dying")}
    engine = f"{SlurmArray.__module__}.{SlurmArray.__name__}"
    settings["engine"] = {"class_path": engine, "init_args": chosen}
    config = write_yaml(inputs / "dying.yaml", settings)
    cluster.run("python", "-m", "patcher_pl", "redteam", "--config", config)
    first, second = measured(inputs / "dying")
    assert first[-1] is None
    assert "ended" in second[-1]
    assert "SLURM task" in second[-1]


def measured(run_dir: Path) -> list[Any]:
    curves = json.loads((run_dir / "results.json").read_text())["curves"]
    assert len(curves) == 2
    keys = ("attack", "seed", "attack_steps", "asr", "benign_accuracy", "error")
    return [[curve[key] for key in keys] for curve in curves]

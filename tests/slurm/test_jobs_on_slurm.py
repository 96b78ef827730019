"""The shipped job file on a real SLURM: its time runs out, it is cancelled, its node dies."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.commands import ROOT, patcher_settings, redteam_settings, write_inputs, write_yaml
from tests.slurm.cluster import NEEDS_SLURM, Cluster
from tests.slurm.red_teams import attack_settings, measured

pytestmark = NEEDS_SLURM
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

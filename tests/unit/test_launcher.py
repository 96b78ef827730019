"""How many processes a launcher has started, by what it leaves in the environment."""

import pytest

from patcher_pl import launcher
from tests.commands import cli, sft_settings, write_inputs, write_yaml

TORCHRUN = {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
# A batch script has these, which starts one process itself.
SBATCH = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "4(x2)"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, (1, 0, 1)), (TORCHRUN, (8, 5, 4)), (SRUN, (8, 5, 4)), (SBATCH, (1, 0, 1))],
    ids=["none", "torchrun", "srun", "sbatch"],
)
def test_what_the_environment_says(monkeypatch, variables, expected):
    for name in TORCHRUN | SRUN | SBATCH:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = launcher.num_processes(), launcher.rank(), launcher.num_processes_here()
    assert found == expected


@pytest.fixture
def launched(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)


def test_commands_of_one_process_are_refused_to_several(launched, tmp_path):
    """Wrong if every process ran the whole sweep in the same directory."""
    base = tmp_path / "fit.yaml"
    base.write_text("{}")
    options = ("--base", base, "--variants", "{a: {}}", "--run_dir", tmp_path / "run")
    refused = cli("sweep", *options).expect(2)
    assert "sweep is for one process, and the launcher has started 8" in refused.err
    assert not (tmp_path / "run").exists()


def test_a_world_can_be_built_by_one_of_several(launched, tmp_path):
    """As when data is first read in a sharded run: the command inherits the launcher's variables."""
    cli("testbed", "--out", tmp_path / "out").expect(0)
    assert (tmp_path / "out" / "data" / "safe.jsonl").is_file()


def test_processes_that_would_train_for_themselves_are_refused(launched, tmp_path):
    """Wrong if eight processes wrote eight models into one directory."""
    config = write_yaml(tmp_path / "fit.yaml", sft_settings(write_inputs(tmp_path)))
    refused = cli("fit", "--config", config, "--run_dir", tmp_path / "run").expect(2)
    assert "trainer.devices: must be the number of processes" in refused.err
    assert "started, 8, divided by trainer.num_nodes, got 1 on 1" in refused.err
    assert not (tmp_path / "run").exists()

"""The shipped strategy for several machines on two network namespaces, one process each, under torchrun."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.commands import ROOT, patcher_settings, redteam_settings, write_inputs, write_yaml
from tests.distributed.network import TIMEOUT_S, Machine, connect, disconnect, finish

pytestmark = pytest.mark.slow

STRATEGY = ROOT / "configs" / "strategies" / "fsdp2-multinode.yaml"


def on_a_cpu(num_nodes: int, devices: int) -> dict[str, Any]:
    """What differs from the shipped strategy: the sizes, and that there is no GPU."""
    size = {"init_args": {"data_parallel_size": num_nodes * devices}}
    sizes = {"num_nodes": num_nodes, "devices": devices, "strategy": size}
    return {"trainer": {"accelerator": "cpu", **sizes}}


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[Machine, Machine]]:
    try:
        both = connect()
    except OSError as error:
        pytest.skip(f"no network namespaces here: {error}")
    yield both
    disconnect(both)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    settings = patcher_settings(folder)
    settings["data"]["batch_size"] = 2
    settings["checkpoint_every_n_steps"] = 2
    settings["trainer"]["max_steps"] = NUM_STEPS
    settings["redteam"] = redteam_settings(folder)
    write_yaml(folder / "experiment.yaml", settings)
    write_yaml(folder / "two-machines.yaml", on_a_cpu(2, 1))
    write_yaml(folder / "one-machine.yaml", on_a_cpu(1, 2))
    return folder


NUM_STEPS = 60
LOST_AT = 10


def fit(inputs: Path, sizes: str, run_dir: Path) -> list[object]:
    files = (inputs / "experiment.yaml", STRATEGY, inputs / f"{sizes}.yaml")
    named = [part for file in files for part in ("--config", file)]
    background = ("--checkpoint_in_background", "true")
    return ["fit", *named, "--run_dir", run_dir, "--ckpt_path", "auto", *background]


def start(
    inputs: Path, machine: Machine, run_dir: Path, max_restarts: int = 0
) -> tuple[subprocess.Popen, Path]:
    log = run_dir.with_name(f"{run_dir.name}-{machine.rank}.log")
    command = fit(inputs, "two-machines", run_dir)
    return machine.torchrun(*command, log=log, max_restarts=max_restarts), log


@pytest.fixture(scope="module")
def one_machine(inputs: Path) -> Path:
    """The same run by two processes of this machine."""
    run_dir = inputs / "one-machine"
    log = inputs / "one-machine.log"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = map(str, fit(inputs, "one-machine", run_dir))
    with log.open("w") as output:
        process = subprocess.Popen(
            [*launcher, "-m", "patcher_pl", *command], cwd=ROOT, stdout=output, stderr=output
        )
    try:
        finish([process], [log])
    finally:
        process.kill()
        process.wait()
    return run_dir


def assert_same(run_dir: Path, other: Path) -> None:
    """Weights to the last bit, and what the red team found."""
    weights = load_file(other / "model" / "model.safetensors")
    found = load_file(run_dir / "model" / "model.safetensors")
    assert found.keys() == weights.keys()
    for name, value in found.items():
        assert (value == weights[name]).all(), name
    assert (run_dir / "results.csv").read_text() == (other / "results.csv").read_text()


def wait_for_step(run_dir: Path, step: int, processes: list[tuple[subprocess.Popen, Path]]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not any(
        int(path.stem.removeprefix("step-")) >= step
        for path in (run_dir / "checkpoints").glob("step-*.ckpt")
    ):
        for process, log in processes:
            assert process.poll() is None, log.read_text()[-6000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_machines_train_what_one_does(machines, inputs, one_machine, tmp_path):
    run_dir = tmp_path / "run"
    started = [start(inputs, machine, run_dir) for machine in machines]
    finish(*zip(*started, strict=True))
    assert_same(run_dir, one_machine)
    settings = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert settings["trainer"]["num_nodes"] == 2
    assert settings["checkpoint_in_background"] is True


def test_the_other_machine_waits_for_one_that_was_lost(machines, inputs, one_machine, tmp_path):
    """torchrun starts both processes again where it may, and they go on from the last checkpoint."""
    run_dir, second = tmp_path / "run", machines[1]
    started = [start(inputs, machine, run_dir, max_restarts=3) for machine in machines]
    wait_for_step(run_dir, LOST_AT, started)
    second.lose()
    started[1][0].wait()
    again = start(inputs, second, run_dir, max_restarts=3)
    finish([started[0][0], again[0]], [started[0][1], again[1]])
    assert_same(run_dir, one_machine)


def test_both_go_on_where_the_first_machine_was_lost(machines, inputs, one_machine, tmp_path):
    """With the first machine the others' rendezvous is gone: they end, and the same command goes on."""
    run_dir = tmp_path / "run"
    started = [start(inputs, machine, run_dir) for machine in machines]
    wait_for_step(run_dir, LOST_AT, started)
    machines[0].lose()
    assert started[0][0].wait(TIMEOUT_S) != 0
    assert started[1][0].wait(TIMEOUT_S) != 0
    again = [start(inputs, machine, run_dir) for machine in machines]
    finish(*zip(*again, strict=True))
    assert_same(run_dir, one_machine)

"""`compare` on a Ray cluster of several nodes: the figures of this process, and a node that is lost."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from patcher_pl.reports import Results
from tests.commands import (
    ROOT,
    command_line,
    end,
    patcher_settings,
    redteam_settings,
    sft_settings,
    write_yaml,
)

pytestmark = pytest.mark.slow
pytest.importorskip("ray")

TIMEOUT_S = 600


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that runs nothing, and nodes that are added; processes of their own on this machine."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def folder(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    for name, settings in (("sft", sft_settings(inputs)), ("patcher", patcher_settings(inputs))):
        settings |= {"num_threads": 1, "checkpoint_every_n_steps": 1}
        write_yaml(folder / f"{name}.yaml", settings)
    write_yaml(folder / "redteam.yaml", redteam_settings(inputs))
    return folder


def begin(folder: Path, run: str, engine: dict[str, Any]) -> subprocess.Popen:
    """Starts the command; what it says goes to a file."""
    content = {
        "max_gradient_evaluations": 6,
        "seeds": [0],
        "redteam": "redteam.yaml",
        "selection": {"redteam": "redteam.yaml", "num_trials": 1, "seeds": [9]},
        "defenses": {"sft": {"fit": "sft.yaml"}, "mine": {"fit": "patcher.yaml"}},
        "engine": engine,
    }
    config = write_yaml(folder / f"{run}.yaml", content)
    with (folder / f"{run}.log").open("ab") as log:
        return subprocess.Popen(
            command_line("compare", "--config", config, "--run_dir", folder / run),
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )


def compare(folder: Path, run: str, engine: dict[str, Any]) -> None:
    end(begin(folder, run, engine), folder / f"{run}.log")


def on(cluster: Any, **options: Any) -> dict[str, Any]:
    return {
        "class_path": "patcher_pl.jobs.RayCluster",
        "init_args": {"address": cluster.address, "num_cpus": 1, **options},
    }


def assert_same(folder: Path, one: str, other: str) -> None:
    """Trials, choices, costs, curves and weights."""
    compared, expected = (
        json.loads((folder / run / "comparison.json").read_text()) for run in (one, other)
    )
    assert compared["trials"] == expected["trials"]
    assert all(trial["error"] is None for trial in expected["trials"])
    assert compared["costs"] == expected["costs"]
    curves, wanted = (Results.load(folder / run / "results.json").curves for run in (one, other))
    assert curves == wanted
    models = sorted((folder / other).rglob("model.safetensors"))
    assert len(models) == 4
    for model in models:
        there = folder / one / model.relative_to(folder / other)
        assert there.read_bytes() == model.read_bytes(), there


@pytest.fixture(scope="module")
def in_process(folder: Path) -> str:
    compare(folder, "here", {"class_path": "patcher_pl.jobs.InProcess"})
    return "here"


def test_two_nodes_find_what_one_process_finds(cluster, folder, in_process):
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    compare(folder, "two-nodes", on(cluster))
    assert_same(folder, "two-nodes", in_process)


def lose(cluster: Any, node: Any, run_dir: Path, process: subprocess.Popen) -> None:
    """Kills all of a node once a run of the search has a checkpoint; a new one takes its place."""
    deadline = time.monotonic() + TIMEOUT_S
    while not list((run_dir / "search").rglob("step-00000002.ckpt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=1)


def begun_twice(run_dir: Path) -> list[Path]:
    """Runs that went on from a checkpoint: how long they took is not known."""
    contents = {path: json.loads(path.read_text()) for path in run_dir.rglob("run.json")}
    assert all(content["done"] for content in contents.values())
    return [path for path, content in contents.items() if "seconds" not in content]


def test_ray_goes_on_elsewhere_with_what_a_lost_node_did(cluster, folder, in_process):
    run, node = "one-lost", cluster.add_node(num_cpus=1)
    process = begin(folder, run, on(cluster))
    lose(cluster, node, folder / run, process)
    end(process, folder / f"{run}.log")
    assert len(begun_twice(folder / run)) == 1
    assert_same(folder, run, in_process)


def test_the_same_command_goes_on_where_ray_did_not(cluster, folder, in_process):
    """The run that was lost is named; it is not begun anew."""
    run, node = "given-up", cluster.add_node(num_cpus=1)
    engine = on(cluster, max_retries=0)
    process = begin(folder, run, engine)
    lose(cluster, node, folder / run, process)
    said = end(process, folder / f"{run}.log", status=2)
    assert ": every trial failed; the first left " in said
    logs = [path.read_text() for path in (folder / run / "search").rglob("log.txt")]
    assert sum("Error" in log for log in logs) == 1, logs
    compare(folder, run, engine)
    assert len(begun_twice(folder / run)) == 1
    assert_same(folder, run, in_process)

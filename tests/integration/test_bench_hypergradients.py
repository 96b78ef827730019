"""If these fail, the benchmark compares different computations, or hides what it left out."""

import json
import subprocess
import sys

import pytest
import torch

from patcher_pl.attackers import InnerProblem
from patcher_pl.hypergradients import Adjoint, FirstOrder
from patcher_pl.models import Weights
from patcher_pl.optim import AdamW, ClipByGlobalNorm, Update
from tests.commands import ROOT
from tests.numerics.hypergradients.problems import CLIP, batch, distance, make_llama, outer_loss
from tests.tiny_runs import make_llama_exact
from tools import bench_hypergradients as bench


@pytest.mark.parametrize("num_steps", [1, 4])
def test_torchopt_does_the_same_job(monkeypatch, num_steps):
    pytest.importorskip("torchopt")
    make_llama_exact(monkeypatch)
    model = make_llama()
    del model.unused  # TorchOpt's weight decay needs a gradient of every parameter.
    update = Update(
        optimizer=AdamW(lr=2e-3, weight_decay=0.1).differentiable(),
        num_steps=num_steps,
        clip=ClipByGlobalNorm(max_norm=CLIP),
    )
    inner = InnerProblem(batches=[batch(n) for n in range(num_steps)], update=update)
    weights = Weights(model)
    before = weights.snapshot()
    found = bench.unroll_with_torchopt(model, weights, inner, outer_loss)
    assert all(a is b for a, b in zip(model.parameters(), weights.parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights.snapshot(), before, strict=True))
    expected = Adjoint().estimate(model, weights, inner, outer_loss).gradients
    first_order = FirstOrder().estimate(model, weights, inner, outer_loss).gradients
    # TorchOpt computes its bias corrections, such as 1 - 0.999, in float32.
    assert distance(found, expected) < 2e-5
    assert distance(first_order, expected) > 1e-3


def test_graphs_that_would_not_fit_are_foreseen():
    rows = [
        {"method": "higher", "num_steps": 1, "memory_mib": 160.0},
        {"method": "higher", "num_steps": 64, "memory_mib": 7168.0},
        {"method": "higher", "num_steps": 128, "skipped": "skipped: needs about 14 GiB"},
        {"method": "adjoint", "num_steps": 64, "memory_mib": 300.0},
    ]
    assert bench.graph_gib(rows, "higher", 256) == 28.0
    assert bench.graph_gib(rows, "adjoint", 256) == 0.0
    assert bench.graph_gib(rows, "torchopt", 256) == 0.0


def test_ratios_are_of_what_was_measured():
    rows = [
        {"method": "adjoint", "num_steps": 4, "memory_mib": 100.0, "seconds": 3.0},
        {"method": "higher", "num_steps": 4, "memory_mib": 400.0, "seconds": 2.0},
        {"method": "higher", "num_steps": 8, "failed": "exit status 1: out of memory"},
    ]
    assert bench.ratios(rows) == {
        "memory_higher_over_adjoint_k4": 4.0,
        "time_adjoint_over_higher_k4": 1.5,
    }
    assert "out of memory" in bench.printed(rows[2])


@pytest.mark.slow
def test_the_script_prints_one_line_of_json(tmp_path):
    pytest.importorskip("torchopt")
    out = tmp_path / "bench.json"
    command = ["tools/bench_hypergradients.py", "--num_steps", "1", "2", "--max_graph_gib", "0.2"]
    done = subprocess.run(
        [sys.executable, *command, "--out", str(out)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads(out.read_text())
    rows = {(row["method"], row["num_steps"]): row for row in report["rows"]}
    for method in ("unrolled", "higher", "torchopt"):
        assert rows[method, 1]["relative_error"] < 1e-3
        assert f"memory_{method}_over_adjoint_k1" in report["ratios"]
        assert "needs about" in rows[method, 2]["skipped"]
        assert f"{method}_k2" not in report["memory_gib"]
    assert report["memory_gib"].keys() >= {"adjoint_k1", "adjoint_k2", "first_order_k2"}

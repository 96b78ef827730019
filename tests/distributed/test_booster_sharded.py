"""Two processes that share a model with FSDP2 or FSDP1 take the steps of Booster that one takes."""

import shutil

import pytest
import torch

from tests.distributed import booster_worker, runs
from tests.tiny_runs import make_llama_exact, snapshot

pytestmark = pytest.mark.slow


def test_two_processes_train_as_one(llama, tmp_path, monkeypatch):
    """Wrong if a shift were lost, or a norm that of one process's part; both go on bit by bit."""
    make_llama_exact(monkeypatch)
    shutil.copytree(llama, tmp_path / "llama")
    alone, logger = booster_worker.make_booster(tmp_path), runs.memory()
    runs.train(alone, tmp_path, 1, runs.NUM_STEPS, logger=logger)
    runs.in_processes("tests.distributed.booster_worker", tmp_path)
    expected = snapshot(alone.model)
    del logger.history["val/loss"]  # A mean over batches, which have half the rows here.
    for kind in ("fsdp2", "fsdp1"):
        weights, history = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-9)
        for name, values in logger.history.items():
            assert history[name] == pytest.approx(values, rel=1e-6, abs=1e-9), (kind, name)

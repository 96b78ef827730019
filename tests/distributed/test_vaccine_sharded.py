"""Two processes that share a model with FSDP2 or FSDP1 take the steps of Vaccine that one takes."""

import shutil

import pytest
import torch

from tests.distributed import runs, vaccine_worker
from tests.tiny_runs import make_llama_exact, snapshot

pytestmark = pytest.mark.slow


def test_two_processes_train_as_one(llama, tmp_path, monkeypatch):
    """Wrong if the perturbation were normalized over one process's part of the batch."""
    make_llama_exact(monkeypatch)
    shutil.copytree(llama, tmp_path / "llama")
    alone, logger = vaccine_worker.make_vaccine(tmp_path), runs.memory()
    runs.train(alone, tmp_path, 1, vaccine_worker.NUM_STEPS, logger=logger)
    runs.in_processes("tests.distributed.vaccine_worker", tmp_path)
    expected = snapshot(alone.model)
    for name in ("fsdp2", "recomputed", "fsdp1"):
        weights, history = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert weights.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-10)
        for metric in ("loss_safe", "loss_perturbed", "grad_norm", "embedding_grad_norm"):
            metric = f"train/{metric}"
            assert list(history[metric].values()) == pytest.approx(
                list(logger.history[metric].values()), rel=1e-9
            )

"""Attack points and retention on a model that two processes share are those of one process."""

import shutil

import pytest
import torch

from patcher_pl.callbacks import AtomicCheckpointIO
from tests.distributed import patcher_options_worker as worker
from tests.distributed import runs
from tests.tiny_runs import make_llama_exact, snapshot

pytestmark = pytest.mark.slow


def test_two_processes_train_as_one(llama, tmp_path, monkeypatch):
    """Wrong if a vector or the base model were those of one part; all go on bit by bit."""
    make_llama_exact(monkeypatch)
    shutil.copytree(llama, tmp_path / "llama")
    alone, extrapolated = {}, {}
    for kind in worker.KINDS:
        defense, logger = worker.make(tmp_path, kind), runs.memory()
        runs.train(
            *(defense, tmp_path, 1, runs.NUM_STEPS), logger=logger, callbacks=[worker.Seeded()]
        )
        del logger.history["val/loss"]  # A mean over batches, which have half the rows here.
        alone[kind] = snapshot(defense.model), logger.history
        if kind in worker.EXTRAPOLATED:
            worker.LOX.apply(defense.model, defense.language_model)
            extrapolated[kind] = snapshot(defense.model)
    runs.in_processes("tests.distributed.patcher_options_worker", tmp_path)
    for kind, expected in extrapolated.items():
        weights = torch.load(tmp_path / f"{kind}-lox.pt", weights_only=True)
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-8)
        assert any((value != alone[kind][0][name]).any() for name, value in expected.items())
    for kind, (expected, history) in alone.items():
        for strategy in ("fsdp2",) if kind in worker.ON_ADAPTERS else ("fsdp2", "fsdp1"):
            weights, found = torch.load(tmp_path / f"{strategy}-{kind}.pt", weights_only=True)
            assert weights.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-9)
            for name, values in history.items():
                assert found[name] == pytest.approx(values, rel=1e-6, abs=1e-9), (strategy, name)
            if kind == "attacks":
                assert max(history["attack/steps_from_theta"].values()) > 2
            if "train/retain_distance" not in history:
                assert kind not in (*worker.RETAINED, "lora-states")
                continue
            # One token seen later or earlier would do: the distances must be there to compare.
            assert max(history["train/retain_distance"].values()) > 1e-6
            assert max(history["train/retain_distance_attacked"].values()) > 1e-6

        # One process goes on from a checkpoint by two, with all vectors.
        saved = tmp_path / f"fsdp2-{kind}" / f"step-{runs.SAVED_AT:08d}.ckpt"
        resumed = worker.make(tmp_path, kind)
        runs.train(
            *(resumed, tmp_path, 1, runs.NUM_STEPS),
            ckpt_path=saved,
            weights_only=True,
            plugins=[AtomicCheckpointIO()],
        )
        for name, value in snapshot(resumed.model).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-9)
        num_points = 1 if kind in ("attacks", "lora") else 2
        assert len(resumed.attack_source.vectors) == num_points

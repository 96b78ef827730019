"""Two processes that share a model keep moments in few bytes as one does, and go on bit by bit."""

import shutil

import pytest
import torch

from patcher_pl.callbacks.checkpoint_files import AtomicCheckpointIO
from patcher_pl.errors import CheckpointError
from tests.distributed import low_memory_worker, runs
from tests.tiny_runs import snapshot

pytestmark = pytest.mark.slow


def test_two_processes_train_as_one(llama, tmp_path, monkeypatch):
    """Wrong if a checkpoint lost moments, or the parts of a weight were stepped by others' moments."""
    shutil.copytree(llama, tmp_path / "llama")
    low_memory_worker.without_compiler(monkeypatch)
    alone = {}
    for state_dtype in low_memory_worker.STATE_DTYPES:
        defense = low_memory_worker.make_patcher(tmp_path, state_dtype)
        runs.train(defense, tmp_path, 1, runs.NUM_STEPS)
        alone[state_dtype] = snapshot(defense.model)
    torch.compiler.set_stance("default")
    runs.in_processes("tests.distributed.low_memory_worker", tmp_path)
    for state_dtype, expected in alone.items():
        weights = torch.load(tmp_path / f"{state_dtype}.pt", weights_only=True)
        for name, value in expected.items():
            # Every step is about 1e-3; blocks and random bits are others.
            error = (weights[name] - value).abs().mean()
            assert error < 5e-4, (state_dtype, name, error)
    saved = tmp_path / "run-8bit" / f"step-{runs.SAVED_AT:08d}.ckpt"
    defense = low_memory_worker.make_patcher(tmp_path, "8bit")
    with pytest.raises(CheckpointError, match="as many processes as saved them, 2, got 1"):
        runs.train(
            *(defense, tmp_path, 1, runs.NUM_STEPS),
            **{"ckpt_path": saved, "weights_only": True},
            callbacks=[runs.saving(tmp_path / "never")],
            plugins=[AtomicCheckpointIO()],
        )

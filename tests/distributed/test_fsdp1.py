"""Two processes that share a model with FSDP1 train, save and export what one process would."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from patcher_pl.callbacks import AtomicCheckpointIO
from patcher_pl.errors import CheckpointError
from tests.distributed import fsdp1_worker, runs
from tests.tiny_runs import make_llama_exact, snapshot

pytestmark = pytest.mark.slow


@pytest.fixture
def exact(monkeypatch):
    make_llama_exact(monkeypatch)


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-10)


def read(path):
    return torch.load(path, weights_only=True)


def test_two_processes_train_as_one(exact, llama, tmp_path):
    """What the processes assert themselves is in fsdp1_worker.py."""
    shutil.copytree(llama, tmp_path / "llama")
    alone, logger = runs.make_patcher(tmp_path / "llama"), runs.memory()
    callbacks = [runs.saving(tmp_path / "by-one")]
    runs.train(alone, tmp_path, 1, runs.NUM_STEPS, logger=logger, callbacks=callbacks)
    runs.in_processes("tests.distributed.fsdp1_worker", tmp_path)

    sharded, logged = read(tmp_path / "patcher.pt")
    assert_close(snapshot(alone.model), sharded)
    assert_close(snapshot(alone.model), read(tmp_path / "recomputed.pt"))
    del logger.history["val/loss"]  # A mean over batches, which have half the rows here.
    for name, values in logger.history.items():
        assert logged[name] == pytest.approx(values, rel=1e-6, abs=1e-9), name
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float64)
    assert_close(snapshot(alone.model), snapshot(exported))

    saved = tmp_path / "saved" / f"step-{runs.SAVED_AT:08d}.ckpt"
    with pytest.raises(CheckpointError, match="as many devices"):
        runs.train(
            *(runs.make_patcher(tmp_path / "llama"), tmp_path, 1, runs.NUM_STEPS),
            ckpt_path=saved,
            weights_only=True,
            plugins=[AtomicCheckpointIO()],
        )

    alone_sft = fsdp1_worker.make_sft(tmp_path)
    runs.train(alone_sft, tmp_path, 1, runs.NUM_STEPS)
    assert_close(snapshot(alone_sft.model), read(tmp_path / "sft.pt"))

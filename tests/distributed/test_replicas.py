"""Processes that hold copies of a model, whole or in parts, train as one process does."""

import shutil

import pytest
import torch

from patcher_pl.callbacks import AtomicCheckpointIO
from tests.distributed import replicas_worker as worker
from tests.distributed import runs
from tests.distributed.runs import assert_close, read
from tests.tiny_runs import make_llama_exact, snapshot

pytestmark = pytest.mark.long

CHECKPOINT = f"step-{runs.SAVED_AT:08d}.ckpt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama):
    """What one process found, what others start from, and what they left."""
    folder = tmp_path_factory.mktemp("replicas")
    shutil.copytree(llama, folder / "llama")
    with pytest.MonkeyPatch.context() as patch:
        make_llama_exact(patch)
        for kind in worker.kinds(2):
            defense, logger = worker.make(folder, kind), runs.memory()
            callbacks = [worker.Seeded()]
            if kind == "plain":
                callbacks.append(runs.saving(folder / "by-one"))
            runs.train(
                *(defense, folder, 1, worker.num_steps(kind)), logger=logger, callbacks=callbacks
            )
            torch.save((snapshot(defense.model), logger.history), folder / f"1-{kind}.pt")
        for size in (2, 4):
            runs.in_processes("tests.distributed.replicas_worker", folder, num_processes=size)
    return folder


@pytest.mark.parametrize(
    ("size", "kind"), [(size, kind) for size in (2, 4) for kind in worker.kinds(size)]
)
def test_they_train_as_one(folder, size, kind):
    """Wrong if a gradient, or a product with a Hessian, were that of one process alone."""
    expected, history = read(folder / f"1-{kind}.pt")
    weights, found = read(folder / f"{size}-{kind}.pt")
    differences = kind == "differences"
    assert_close(weights, expected, 1e-7 if differences else 1e-9)
    history.pop("val/loss")  # A mean over batches, which have fewer rows there.
    for name, values in history.items():
        tolerance = 1e-3 if differences else 1e-6
        assert found[name] == pytest.approx(values, rel=tolerance, abs=1e-9), name


@pytest.mark.parametrize("run", ["2-from-by-one", "4-from-by-one", "4-from-2-plain"])
def test_they_go_on_from_others_checkpoints(folder, run):
    assert_close(read(folder / f"{run}.pt"), read(folder / "1-plain.pt")[0], 1e-9)


@pytest.mark.parametrize("size", [2, 4])
def test_one_process_goes_on_from_theirs(folder, tmp_path, monkeypatch, size):
    make_llama_exact(monkeypatch)
    resumed = worker.make(folder, "plain")
    runs.train(
        *(resumed, tmp_path, 1, runs.NUM_STEPS),
        ckpt_path=folder / f"{size}-plain" / CHECKPOINT,
        weights_only=True,
        plugins=[AtomicCheckpointIO()],
    )
    assert_close(snapshot(resumed.model), read(folder / "1-plain.pt")[0], 1e-9)

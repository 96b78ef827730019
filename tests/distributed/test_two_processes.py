"""Two processes that share a model train, save and export what one process would."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from lightning import Trainer
from transformers import AutoModelForCausalLM

from patcher_pl.callbacks import AtomicCheckpointIO
from patcher_pl.defenses import Patcher
from tests.concurrent_runs import concurrent
from tests.distributed import runs
from tests.distributed.runs import assert_close, read
from tests.distributed.worker import SCENARIOS
from tests.tiny_runs import make_llama_exact, snapshot

CHECKPOINT = f"step-{runs.SAVED_AT:08d}.ckpt"
SCONTROL = """#!/bin/sh
echo "$@" >> "{}"
"""


def prepare(folder: Path, llama: Path, gpt2: Path) -> None:
    """What the two processes find: models, a checkpoint by one process, and a stand-in for SLURM."""
    shutil.copytree(llama, folder / "llama")
    shutil.copytree(gpt2, folder / "gpt2")
    (folder / "bin").mkdir()
    scontrol = folder / "bin" / "scontrol"
    scontrol.write_text(SCONTROL.format(folder / "requeued"))
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    with pytest.MonkeyPatch.context() as patch:
        make_llama_exact(patch)
        patch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("SLURM_JOB_ID", "42")
        alone = runs.make_patcher(folder / "llama")
        logger = runs.memory()
        callbacks = [runs.saving(folder / "by-one")]
        runs.train(alone, folder, 1, runs.NUM_STEPS, logger=logger, callbacks=callbacks)
        _, trainer = attacked_beside(folder, folder / "by-one" / CHECKPOINT)
        trainer.save_checkpoint(folder / "by-beside.ckpt")
        torch.save((snapshot(alone.model), logger.history), folder / "alone.pt")
        runs.in_processes("tests.distributed.worker", folder)


def attacked_beside(folder: Path, saved: Path) -> tuple[Patcher, Trainer]:
    """The run with attackers elsewhere, gone on from a checkpoint of the sequential form."""
    remote = concurrent(folder / "mailbox", [runs.make_attacker()], lock_step=True)
    beside = runs.make_patcher(folder / "llama", attacker=remote)
    trainer = runs.train(
        *(beside, folder, 1, runs.SAVED_AT),
        ckpt_path=saved,
        weights_only=True,
        plugins=[AtomicCheckpointIO()],
    )
    return beside, trainer


@pytest.fixture(scope="session")
def folder(tmp_path_factory, llama, gpt2):
    """What the two processes left; made once, by whichever test process needs it first."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "two-processes"
    with FileLock(shared / "two-processes.lock"):
        if not folder.exists():
            folder.mkdir()
            prepare(folder, llama, gpt2)
    assert (folder / "outcome-0.json").exists(), "an earlier test says why"
    return folder


@pytest.fixture
def exact(monkeypatch):
    make_llama_exact(monkeypatch)


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_scenario(folder, scenario):
    """Each of them asserts within the processes; see tests/distributed/worker.py."""
    for rank in range(2):
        outcome = json.loads((folder / f"outcome-{rank}.json").read_text())
        assert outcome.get(scenario, "was not reached") == "passed", outcome[scenario]


def test_two_processes_train_as_one(folder):
    """Weights after four rounds with clipping and accumulation, and everything that was logged."""
    (alone, logged_alone), (sharded, logged) = (
        read(folder / "alone.pt"),
        read(folder / "patcher.pt"),
    )
    assert_close(alone, sharded)
    assert max(float((value - start).abs().max()) for value, start in moved(folder, alone)) > 1e-3
    assert logged.keys() == logged_alone.keys()
    del logged_alone["val/loss"]  # A mean over batches, which have half the rows here.
    for name, values in logged_alone.items():
        assert logged[name] == pytest.approx(values, rel=1e-6, abs=1e-9), name


def moved(folder, weights):
    start = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float64).state_dict()
    return [(value, start[name]) for name, value in weights.items()]


def test_the_exported_model_is_the_same(folder):
    alone, _ = read(folder / "alone.pt")
    exported = AutoModelForCausalLM.from_pretrained(folder / "exported", dtype=torch.float64)
    assert_close(alone, snapshot(exported))
    config = json.loads((folder / "exported" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("run", ["from-one", "from-beside", "recomputed"])
def test_ways_that_change_nothing(folder, run):
    """Checkpoints by one process, in either form, resumed by two; recomputation, offloading, copies on the host."""
    assert_close(read(folder / "alone.pt")[0], read(folder / f"{run}.pt"))


def test_packed_batches_and_fused_optimizers_change_nothing(folder):
    """But for the rounding of torch's fused kernel, whose constants are float32."""
    assert_close(read(folder / "alone.pt")[0], read(folder / "packed.pt"), tolerance=1e-6)


def test_one_process_goes_on_from_a_checkpoint_by_two(folder, exact, tmp_path):
    saved = folder / "by-two" / CHECKPOINT
    resumed = runs.make_patcher(folder / "llama")
    runs.train(
        *(resumed, tmp_path, 1, runs.NUM_STEPS),
        ckpt_path=saved,
        weights_only=True,
        plugins=[AtomicCheckpointIO()],
    )
    alone, _ = read(folder / "alone.pt")
    assert_close(alone, snapshot(resumed.model))


def test_concurrent_attacks_go_on_from_a_checkpoint_by_two(folder, exact):
    """With the vector in use and the theta that it belongs to."""
    sequential, _ = attacked_beside(folder, folder / "by-one" / CHECKPOINT)
    sharded, _ = attacked_beside(folder, folder / "by-two" / CHECKPOINT)
    (expected,), (vector,) = (
        each.attack_source.vectors_at(runs.SAVED_AT) for each in (sequential, sharded)
    )
    assert sequential.attack_source.staleness(runs.SAVED_AT) == 1
    assert sharded.attack_source.staleness(runs.SAVED_AT) == 1
    for name, part, value in zip(sharded.all_weights.names, vector, expected, strict=True):
        torch.testing.assert_close(part, value, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("name", runs.ESTIMATORS)
def test_hypergradients_by_differences_agree(folder, exact, tmp_path, name):
    alone = runs.make_hypergradient_patcher(folder / "llama", runs.ESTIMATORS[name])
    logger = runs.memory()
    runs.train(alone, tmp_path, 1, 2, logger=logger)
    sharded, logged = read(folder / f"{name}.pt")
    assert_close(snapshot(alone.model), sharded, tolerance=1e-7)
    for metric in ("predicted_change", "actual_change", "attack_loss"):
        key = f"hypergradient/{metric}"
        assert logged[key] == pytest.approx(logger.history[key], rel=1e-3), key


def test_a_signal_saves_requeues_and_can_be_resumed(folder):
    for name in ("in-a-step", "in-an-attack"):
        assert_close(read(folder / "alone.pt")[0], read(folder / f"{name}.pt"))
        assert (folder / name / "last.ckpt").resolve().name == "step-00000004.ckpt"
    assert (folder / "requeued").read_text().splitlines() == ["requeue 42"] * 2

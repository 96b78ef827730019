"""Checkpoints that are written while training goes on hold what they say, and are waited for."""

import os
import signal
import subprocess
import threading
import time
from collections import OrderedDict

import pytest
import torch
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback

from patcher_pl.callbacks import AtomicCheckpointIO, GracefulStop, RunCheckpoint
from patcher_pl.callbacks.background_writing import BackgroundWriter, in_host_memory
from patcher_pl.callbacks.run_checkpoint import find_last
from patcher_pl.defenses import Patcher
from patcher_pl.errors import CheckpointError, RunInterrupted
from patcher_pl.models import LanguageModel
from tests.commands import (
    ROOT,
    StopAt,
    cli,
    command_line,
    patcher_settings,
    write_inputs,
    write_yaml,
)
from tests.tiny_runs import ATTACKER, Rows, adamw, assert_same_content, fit

REAL_SAVE = torch.save
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


class Gate(Callback):
    """Stands for a slow disk: `torch.save` waits until it is opened, after a step for instance."""

    def __init__(self, monkeypatch, opened_after=None):
        self.opened_after, self.event = opened_after, threading.Event()
        monkeypatch.setattr(torch, "save", self._save)

    def _save(self, *args, **kwargs):
        assert self.event.wait(TIMEOUT_S), "training waited for the disk"
        REAL_SAVE(*args, **kwargs)

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.opened_after:
            self.event.set()


class WaitForFailure(Callback):
    """Goes on after a step once the run knows that a checkpoint could not be written."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *_):
        deadline = time.monotonic() + TIMEOUT_S
        while trainer.global_step == self.step and not pl_module.stop_requested:
            assert time.monotonic() < deadline, "nobody was told"
            time.sleep(0.01)


def train(llama, folder, callbacks=(), num_steps=8, every_n_steps=3, in_background=True):
    """Patcher, with an attack before every second step."""
    defense = Patcher(
        LanguageModel(path=str(llama)), optimizer=adamw(), attacker=ATTACKER, refresh_every=2
    )
    checkpoint = RunCheckpoint(folder, every_n_steps, in_background=in_background)
    seed_everything(0, verbose=False)
    fit(
        defense,
        Rows(folder.parent / "rows").module(),
        num_steps,
        callbacks=[*callbacks, checkpoint, GracefulStop(checkpoint)],
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=True,
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_of_its_step_although_training_went_on(llama, tmp_path, monkeypatch):
    """Weights, moments, attack vectors and counters: none of what the next two steps made of them."""
    train(llama, tmp_path / "in-turn", in_background=False, num_steps=5)
    train(llama, tmp_path / "beside", [Gate(monkeypatch, opened_after=5)], num_steps=5)
    kept = ["last.ckpt", "step-00000003.ckpt", "step-00000005.ckpt"]
    assert names(tmp_path / "beside") == names(tmp_path / "in-turn") == kept
    for name in kept:
        in_turn, beside = (
            torch.load(tmp_path / run / name, weights_only=True) for run in ("in-turn", "beside")
        )
        assert_same_content(in_turn, beside)


def test_so_many_are_kept(llama, tmp_path):
    train(llama, tmp_path / "run", every_n_steps=1)
    kept = ["last.ckpt", "step-00000007.ckpt", "step-00000008.ckpt"]
    assert names(tmp_path / "run") == kept
    assert find_last(tmp_path / "run").name == kept[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_waits_for_the_one_that_is_written(llama, tmp_path, monkeypatch, number):
    """The disk is slow until somebody waits for it."""
    gate, wait = Gate(monkeypatch), BackgroundWriter.wait

    def open_and_wait(writer):
        if writer._writing is not None:
            gate.event.set()
        wait(writer)

    monkeypatch.setattr(BackgroundWriter, "wait", open_and_wait)
    with pytest.raises(RunInterrupted):
        train(llama, tmp_path / "run", [StopAt(4, number=int(number))])
    assert names(tmp_path / "run") == ["last.ckpt", "step-00000003.ckpt", "step-00000004.ckpt"]
    assert find_last(tmp_path / "run").name == "step-00000004.ckpt"


def test_a_signal_while_the_end_is_saved_tears_nothing(llama, tmp_path, monkeypatch):
    """Wrong if it killed the run there, or if nobody looked at it."""

    def save(content, *args, **kwargs):
        if content["global_step"] == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        REAL_SAVE(content, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RunInterrupted):
        train(llama, tmp_path / "run")
    assert find_last(tmp_path / "run").name == "step-00000008.ckpt"
    assert not list((tmp_path / "run").glob(".*"))


def test_a_run_that_fails_waits_for_the_one_that_is_written(llama, tmp_path, monkeypatch):
    class Fail(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4:
                gate.event.set()
                raise ZeroDivisionError

    gate = Gate(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        train(llama, tmp_path / "run", [Fail()])
    assert find_last(tmp_path / "run").name == "step-00000003.ckpt"


def test_a_full_disk_ends_the_run_before_its_next_step(llama, tmp_path, monkeypatch):
    """Wrong if it went on to the next checkpoint and all steps until there were lost."""
    reached, before = [], signal.getsignal(signal.SIGTERM)

    class Count(Callback):
        def on_train_batch_end(self, trainer, *_):
            reached.append(trainer.global_step)

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(CheckpointError, match=r"step-00000003\.ckpt.*No space left on device"):
        train(
            llama, tmp_path / "run", [Count(), WaitForFailure(4)], num_steps=1000, every_n_steps=3
        )
    assert reached == [1, 2, 3, 4]
    assert signal.getsignal(signal.SIGTERM) == before, "the run was not taken down"
    assert names(tmp_path / "run") == []


def test_a_copy_shares_nothing_but_what_was_shared():
    weight = torch.arange(6.0)
    counter = {"steps": [1]}
    content = {"a": OrderedDict(head=weight.detach(), tied=weight.detach()), "row": weight[2:4]}
    content |= {"counter": counter, "empty": [torch.empty(0), torch.empty(0)]}
    content["a"]._metadata = {"": {"version": 2}}
    copied = in_host_memory(content)
    weight.zero_()
    counter["steps"].append(2)
    assert copied["a"]["head"].tolist() == [0, 1, 2, 3, 4, 5]
    assert copied["row"].tolist() == [2, 3]
    assert copied["counter"] == {"steps": [1]}
    assert copied["a"]["head"].data_ptr() == copied["a"]["tied"].data_ptr()
    assert copied["a"]._metadata == {"": {"version": 2}}


def test_moments_in_8_bits_are_copied():
    """Wrong if torchao's tensors, which take no notice of `copy`, went on changing while they are written."""
    optim = pytest.importorskip("torchao.optim")
    weight = torch.nn.Parameter(torch.ones(32, 128))
    optimizer = optim.AdamW8bit([weight])
    torch.manual_seed(0)
    kept: list[torch.Tensor] = []
    with torch.compiler.set_stance("force_eager"):
        for _ in range(2):
            weight.grad = torch.randn_like(weight)
            optimizer.step()
            moment = optimizer.state[weight]["exp_avg"]
            if not kept:
                copied = in_host_memory({"moment": moment})["moment"]
                kept = [moment.dequantize(), copied.dequantize()]
    assert type(copied) is type(moment)
    assert not torch.equal(moment.dequantize(), kept[0])
    assert torch.equal(kept[1], kept[0])
    assert torch.equal(copied.dequantize(), kept[0])


@pytest.mark.long
def test_a_run_that_was_killed_while_it_wrote_ends_as_one_that_was_not(inputs, tmp_path):
    """Half of step 6 is on the disk and step 7 is taken; it goes on from step 3."""
    settings = patcher_settings(inputs) | {"checkpoint_in_background": True}
    plain = write_yaml(tmp_path / "config.yaml", settings)
    kill = {"class_path": "tests.commands.KillWhileWriting", "init_args": {"step": 6}}
    settings["trainer"]["callbacks"] = [kill]
    killing = write_yaml(tmp_path / "killing.yaml", settings)
    run_dir = tmp_path / "run"
    said = subprocess.run(
        command_line("fit", "--config", killing, "--run_dir", run_dir),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert said.returncode == -signal.SIGKILL, said.stderr
    checkpoints = run_dir / "checkpoints"
    assert len(list(checkpoints.glob(".step-00000006.ckpt.*.tmp"))) == 1
    assert find_last(checkpoints).name == "step-00000003.ckpt"
    cli("fit", "--config", plain, "--run_dir", run_dir, "--ckpt_path", "last").expect(0)
    cli("fit", "--config", plain, "--run_dir", tmp_path / "undisturbed").expect(0)
    for file in ("model/model.safetensors", "checkpoints/last.ckpt"):
        whole, resumed = (tmp_path / run / file for run in ("undisturbed", "run"))
        if file.endswith(".ckpt"):
            contents = [torch.load(path, weights_only=True) for path in (whole, resumed)]
            assert_same_content(contents[0]["state_dict"], contents[1]["state_dict"])
            assert_same_content(contents[0]["optimizer_states"], contents[1]["optimizer_states"])
        else:
            assert whole.read_bytes() == resumed.read_bytes()
    assert names(checkpoints) == ["last.ckpt", "step-00000006.ckpt", "step-00000008.ckpt"]

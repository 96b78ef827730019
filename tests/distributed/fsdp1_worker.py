"""What two processes with FSDP1 do for `test_fsdp1.py`; run by `in_processes`."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy

from patcher_pl.callbacks import GracefulStop, RunCheckpoint
from patcher_pl.defenses import SFT
from patcher_pl.errors import CheckpointError, RunInterrupted
from patcher_pl.losses import differentiable_loss
from patcher_pl.models import LanguageModel, Sharding, Weights, export_model
from patcher_pl.models.sharding import gathered, on_first_process
from tests.distributed import runs
from tests.distributed.worker import SignalOnOne, assert_same_parts, whole
from tests.tiny_runs import make_llama_exact

RANK = int(os.environ.get("RANK", 0))


class CPUStrategy(FSDPStrategy):
    """Lightning's, in float64; being a subclass, it is not refused on a CPU."""

    def __init__(self) -> None:
        super().__init__(state_dict_type="sharded")

    @property
    def precision_plugin(self) -> FSDPPrecision:
        plugin = FSDPPrecision("32-true")
        plugin._desired_input_dtype = torch.float64
        return plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Any) -> None:
        self._precision_plugin = precision_plugin


def train(defense: Any, folder: Path, **options: Any) -> Any:
    return runs.train(defense, folder, 2, runs.NUM_STEPS, strategy=CPUStrategy(), **options)


def make_sft(folder: Path) -> SFT:
    model = LanguageModel(path=str(folder / "llama"), dtype="float64")
    return SFT(model, optimizer=runs.build_optimizer, max_grad_norm=0.5, accumulate_grad_batches=2)


def shifts_are_not_lost(folder: Path) -> None:
    """Shifts after forward passes of all kinds, and the refusals between two passes."""
    source = LanguageModel(path=str(folder / "llama"), dtype="float64")
    device = torch.device("cpu")
    rounded = Sharding(param_dtype="float32").wrap(source.load_model(), device)
    model = Sharding().wrap(source.load_model(), device).train()
    plain = source.load_model().train()
    ids = torch.arange(12).reshape(2, 6) + 20
    batch: Any = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    weights, plain_weights = Weights(model), Weights(plain)
    assert weights.names == plain_weights.names
    before = weights.snapshot()
    norm = weights.shards.norm(before)
    torch.testing.assert_close(norm, plain_weights.shards.norm(plain_weights.snapshot()))
    for grad_enabled in (False, True):
        with torch.set_grad_enabled(grad_enabled):
            differentiable_loss(model, batch)  # No backward pass follows.
        change = [0.1 * value for value in before]
        plain_change = [0.1 * value for value in plain_weights.snapshot()]
        with weights.shifted(change), plain_weights.shifted(plain_change):
            loss, expected = differentiable_loss(model, batch), differentiable_loss(plain, batch)
            torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
            found = weights.shards.gradients(loss)
            wanted = plain_weights.shards.gradients(expected)
        torch.testing.assert_close(
            weights.shards.norm(found), plain_weights.shards.norm(wanted), rtol=1e-9, atol=0
        )
        cast = Weights(rounded)
        with cast.shifted(change), torch.no_grad():
            loss = differentiable_loss(rounded, batch)
            assert 0 < float((loss - expected).abs()) < 1e-5, "computed in float32"
        for tensor, saved in zip(weights.shards.tensors, before, strict=True):
            assert torch.equal(tensor, saved), "the shift must be undone to the last bit"
    loss = differentiable_loss(model, batch)
    for change_now in (weights.shifted(before), weights.trainable()):
        with pytest.raises(RuntimeError, match="between a forward pass"), change_now:
            pass
    loss.backward()
    accumulated = weights.shards.norm([p.grad for p in weights.parameters])
    with weights.trainable():
        for _ in range(2):  # A second time: nothing may be left of the first.
            found = weights.shards.gradients(differentiable_loss(model, batch))
            torch.testing.assert_close(weights.shards.norm(found), accumulated)
    differentiable_loss(model, batch).backward()  # Adds to what was set aside.
    twice = weights.shards.norm([p.grad for p in weights.parameters])
    torch.testing.assert_close(twice, 2 * accumulated)


def patcher_trains_and_resumes(folder: Path) -> None:
    logger = runs.memory()
    defense = runs.make_patcher(folder / "llama")
    directory = folder / "saved"
    train(defense, folder, logger=logger, callbacks=[runs.saving(directory)])
    weights, model = whole(defense.model), gathered(defense.model)
    on_first_process(lambda: export_model(model, defense.tokenizer, folder / "exported"))  # type: ignore[arg-type]
    if RANK == 0:
        torch.save((weights, logger.history), folder / "patcher.pt")
    saved = directory / f"step-{runs.SAVED_AT:08d}.ckpt"
    again = runs.make_patcher(folder / "llama")
    train(again, folder, ckpt_path=saved, weights_only=True)
    assert_same_parts(again, defense)


def sft_trains(folder: Path) -> None:
    """On packed batches; one process has padded ones."""
    defense = make_sft(folder)
    train(defense, folder, packing=True)
    weights = whole(defense.model)
    if RANK == 0:
        torch.save(weights, folder / "sft.pt")


def a_signal_stops_both(folder: Path) -> None:
    checkpoint = RunCheckpoint(folder / "stopped", every_n_steps=100)
    callbacks = [SignalOnOne(4, between_steps=True), checkpoint, GracefulStop(checkpoint)]
    with pytest.raises(RunInterrupted, match="attack"):
        train(runs.make_patcher(folder / "llama"), folder, callbacks=callbacks)
    assert (folder / "stopped" / "step-00000004.ckpt" / "manifest.json").exists()


def recomputing_changes_nothing(folder: Path) -> None:
    """Activation checkpointing reads weights again in the backward pass; they must be shifted."""
    ways = {"gradient_checkpointing": True, "weight_copies_on": "host"}
    defense = runs.make_patcher(folder / "llama", language_model=ways)
    train(defense, folder)
    weights = whole(defense.model)
    if RANK == 0:
        torch.save(weights, folder / "recomputed.pt")


def another_kind_of_run_is_refused(folder: Path) -> None:
    saved = folder / "by-one" / f"step-{runs.SAVED_AT:08d}.ckpt"
    with pytest.raises(CheckpointError, match="as many devices"):
        train(runs.make_patcher(folder / "llama"), folder, ckpt_path=saved, weights_only=True)


SCENARIOS = (
    shifts_are_not_lost,
    patcher_trains_and_resumes,
    sft_trains,
    recomputing_changes_nothing,
    a_signal_stops_both,
    another_kind_of_run_is_refused,
)


def main() -> int:
    torch.distributed.init_process_group("gloo")
    with pytest.MonkeyPatch.context() as patch:
        make_llama_exact(patch)
        for scenario in SCENARIOS:
            scenario(Path(sys.argv[1]))
            print(scenario.__name__, flush=True)
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What two processes do for the tests beside this file; run by `in_processes`."""

import io
import itertools
import json
import os
import signal
import sys
import threading
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.distributed.checkpoint import FileSystemWriter, state_dict_saver
from torch.distributed.device_mesh import init_device_mesh

from patcher_pl.callbacks import AtomicCheckpointIO, GracefulStop, RunCheckpoint
from patcher_pl.errors import CheckpointError, ConfigError, RunInterrupted
from patcher_pl.losses import differentiable_loss
from patcher_pl.models import LanguageModel, Sharding, Weights, export_model
from patcher_pl.models.sharding import gathered, on_first_process
from tests.distributed import runs
from tests.tiny_runs import assert_same, assert_same_content, make_llama_exact, snapshot

RANK = int(os.environ.get("RANK", 0))


def whole(model: Any) -> dict[str, torch.Tensor] | None:
    """All weights on the first process, None on the other."""
    plain = gathered(model)
    return None if plain is None else snapshot(plain)


def assert_same_parts(one: Any, other: Any) -> None:
    """The weights that this process holds agree to the last bit."""
    parts = Weights(one.model).snapshot(), Weights(other.model).snapshot()
    assert all(torch.equal(first, second) for first, second in zip(*parts, strict=True))


def patcher_trains_and_resumes(folder: Path) -> None:
    """The main run; its checkpoint by two; the same again from there; those by one process."""
    logger = runs.memory()
    defense = runs.make_patcher(folder / "llama")
    directory = folder / "by-two"
    runs.train(
        defense, folder, 2, runs.NUM_STEPS, logger=logger, callbacks=[runs.saving(directory)]
    )
    weights = whole(defense.model)
    model = gathered(defense.model)
    on_first_process(lambda: export_model(model, defense.tokenizer, folder / "exported"))  # type: ignore[arg-type]
    if RANK == 0:
        torch.save((weights, logger.history), folder / "patcher.pt")
    saved = directory / f"step-{runs.SAVED_AT:08d}.ckpt"
    again = runs.make_patcher(folder / "llama")
    runs.train(again, folder, 2, runs.NUM_STEPS, ckpt_path=saved, weights_only=True)
    assert_same_parts(again, defense)
    tokens = [None, None]
    torch.distributed.all_gather_object(tokens, (again.cost.tokens, defense.cost.tokens))
    assert sum(pair[0] for pair in tokens) == sum(pair[1] for pair in tokens)  # type: ignore[index]

    on_host = runs.make_patcher(folder / "llama", language_model={"weight_copies_on": "host"})
    by_one = folder / "by-one" / f"step-{runs.SAVED_AT:08d}.ckpt"
    runs.train(on_host, folder, 2, runs.NUM_STEPS, ckpt_path=by_one, weights_only=True)
    weights = whole(on_host.model)
    if RANK == 0:
        torch.save(weights, folder / "from-one.pt")

    after_beside = runs.make_patcher(folder / "llama")
    by_beside = folder / "by-beside.ckpt"
    runs.train(after_beside, folder, 2, runs.NUM_STEPS, ckpt_path=by_beside, weights_only=True)
    weights = whole(after_beside.model)
    if RANK == 0:
        torch.save(weights, folder / "from-beside.pt")


def recomputing_changes_nothing(folder: Path) -> None:
    """Activation checkpointing gathers weights again in the backward pass; they must be shifted."""
    ways = {
        "gradient_checkpointing": True,
        "sharding": Sharding(reshard_after_forward=False, cpu_offload=True),
    }
    defense = runs.make_patcher(folder / "llama", language_model=ways)
    runs.train(defense, folder, 2, runs.NUM_STEPS)
    weights = whole(defense.model)
    if RANK == 0:
        torch.save(weights, folder / "recomputed.pt")


def packing_changes_nothing(folder: Path) -> None:
    """Every process packs its own conversations; fused optimizers step on shards."""
    defense = runs.make_patcher(
        folder / "llama",
        attacker=replace(runs.make_attacker(), optimizer=replace(runs.ADAMW, fused=True)),
        optimizer=lambda parameters: runs.build_optimizer(parameters, fused=True),
    )
    runs.train(defense, folder, 2, runs.NUM_STEPS, packing=True)
    weights = whole(defense.model)
    if RANK == 0:
        torch.save(weights, folder / "packed.pt")


def hypergradients_by_differences(folder: Path) -> None:
    for name in runs.ESTIMATORS:
        logger = runs.memory()
        defense = runs.make_hypergradient_patcher(folder / "llama", runs.ESTIMATORS[name])
        runs.train(defense, folder, 2, 2, logger=logger)
        weights = whole(defense.model)
        if RANK == 0:
            torch.save((weights, logger.history), folder / f"{name}.pt")


def dropout_goes_on(folder: Path) -> None:
    """Every process goes on with its own random numbers, and they had not the same."""
    directory = folder / "dropout"
    straight = runs.make_dropping_sft(folder / "gpt2")
    torch.manual_seed(1)
    runs.train(straight, folder, 2, runs.NUM_STEPS, callbacks=[runs.saving(directory)])
    resumed = runs.make_dropping_sft(folder / "gpt2")
    saved = directory / f"step-{runs.SAVED_AT:08d}.ckpt"
    runs.train(resumed, folder, 2, runs.NUM_STEPS, ckpt_path=saved, weights_only=True)
    assert_same_parts(resumed, straight)
    states = torch.load(saved / "meta.pt", weights_only=True)["defense"]["random_states"]
    assert not torch.equal(states[0]["cpu"], states[1]["cpu"])


class SignalOnOne(Callback):
    """Sends a signal to the second process only."""

    def __init__(self, step: int, *, between_steps: bool) -> None:
        self.place = (step, between_steps)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if RANK == 1 and (trainer.global_step, pl_module.is_between_steps) == self.place:
            os.kill(os.getpid(), signal.SIGUSR1)


def a_signal_stops_both(folder: Path) -> None:
    """A flag that one process alone looked at would leave the other waiting for it for ever."""
    for name, step, between_steps in (("in-a-step", 3, False), ("in-an-attack", 4, True)):
        checkpoint = RunCheckpoint(folder / name, every_n_steps=100)
        stop = GracefulStop(checkpoint)
        callbacks = [SignalOnOne(step, between_steps=between_steps), checkpoint, stop]
        defense = runs.make_patcher(folder / "llama")
        with pytest.raises(RunInterrupted, match="attack" if between_steps else "two steps"):
            runs.train(defense, folder, 2, runs.NUM_STEPS, callbacks=callbacks)
        assert stop.signal == signal.SIGUSR1
        saved = folder / name / "step-00000004.ckpt"  # A step is finished, an attack is not.
        resumed = runs.make_patcher(folder / "llama")
        runs.train(resumed, folder, 2, runs.NUM_STEPS, ckpt_path=saved, weights_only=True)
        weights = whole(resumed.model)
        if RANK == 0:
            torch.save(weights, folder / f"{name}.pt")


def a_checkpoint_in_the_background_is_of_its_step(folder: Path) -> None:
    """Both processes are two steps further when writing begins; see `patcher_trains_and_resumes`."""
    gate, save = threading.Event(), state_dict_saver.save

    class OpenLater(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == runs.SAVED_AT + 2:
                gate.set()

    def save_late(*arguments: Any, **options: Any) -> Any:
        assert gate.wait(120), "training waited"
        return save(*arguments, **options)

    checkpoint = runs.saving(folder / "beside", in_background=True)
    defense = runs.make_patcher(folder / "llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_dict_saver, "save", save_late)
        runs.train(defense, folder, 2, runs.NUM_STEPS, callbacks=[checkpoint, OpenLater()])
    for step in (runs.SAVED_AT, runs.NUM_STEPS):
        beside, in_turn = (
            AtomicCheckpointIO().load_checkpoint(folder / name / f"step-{step:08d}.ckpt")
            for name in ("beside", "by-two")
        )
        for content in (beside, in_turn):
            del content["defense"]["random_states"]  # Of whatever ran here before.
        assert_same_content(beside, in_turn)
    if RANK == 0:
        left = sorted(path.name for path in (folder / "beside").iterdir())
        assert left == ["last.ckpt", "step-00000005.ckpt", "step-00000008.ckpt"], left
    torch.distributed.barrier()


def a_full_disk_leaves_the_checkpoint_before(folder: Path) -> None:
    """Whichever process it hits, and whether in its weights or in what the first writes alone."""
    directory = folder / "full-disk"
    for (rank, function, holder), in_background in itertools.product(
        ((1, "write_data", FileSystemWriter), (0, "save", torch)), (False, True)
    ):
        checkpoint = RunCheckpoint(directory, every_n_steps=2, in_background=in_background)
        defense = runs.make_dropping_sft(folder / "gpt2")

        class FillDisk(Callback):
            def __init__(self, patch: pytest.MonkeyPatch) -> None:
                self.patch = patch

            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                if trainer.global_step == 3:
                    checkpoint.wait()  # noqa: B023
                if trainer.global_step == 3 and rank == RANK:  # noqa: B023
                    self.patch.setattr(holder, function, refuse)  # noqa: B023

        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(
                CheckpointError, match=r"step-00000004\.ckpt.*(No space|another process).* last"
            ),
        ):
            runs.train(defense, folder, 2, 8, callbacks=[checkpoint, FillDisk(patch)])
        left = sorted(path.name for path in directory.iterdir())
        assert left == ["last.ckpt", "step-00000002.ckpt"], left
        assert (directory / "last.ckpt" / "manifest.json").exists()


REAL_SAVE = torch.save


def refuse(*arguments: Any, **options: Any) -> None:
    """Stands for a function that writes to the disk; what is only pickled goes on."""
    if isinstance(arguments[-1], io.BytesIO):
        REAL_SAVE(*arguments, **options)
        return
    raise OSError(28, "No space left on device")


def every_family_is_loaded_and_gathered(folder: Path) -> None:
    """Tied embeddings, buffers that no checkpoint has, weights offloaded to the host."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
    for family in ("llama", "gpt2"):
        for offload in (False, True):
            source = LanguageModel(
                path=str(folder / family), sharding=Sharding(cpu_offload=offload)
            )
            model, plain = source.load_sharded(mesh), source.load_model()
            buffers = dict(plain.named_buffers())
            for name, buffer in model.named_buffers():
                assert torch.equal(buffer, buffers[name]), name
            copy = gathered(model)
            if copy is not None:
                assert_same(snapshot(copy), snapshot(plain))
                assert copy.config.to_dict() == plain.config.to_dict()
                assert copy.generation_config.to_dict() == plain.generation_config.to_dict()  # type: ignore[union-attr]
    missing = LanguageModel(path=str(folder / "nothing"))
    with pytest.raises(ConfigError, match="could not be loaded"):  # on both; none is left waiting
        missing.load_sharded(mesh)


def shifts_are_not_lost(folder: Path) -> None:
    """The silent errors of sharded weights, one by one; see the messages."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
    source = LanguageModel(path=str(folder / "llama"), dtype="float64")
    model, plain = source.load_sharded(mesh).train(), source.load_model().train()
    parameters = list(model.parameters())
    ids = torch.arange(12).reshape(2, 6) + 20
    batch: Any = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with torch.no_grad():
        differentiable_loss(model, batch)
    weights, plain_weights = Weights(model), Weights(plain)  # Not of the gathered root.
    assert all(one is other for one, other in zip(weights.parameters, parameters, strict=True))
    generator = torch.Generator().manual_seed(0)
    vector = [0.1 * torch.randn(p.shape, generator=generator).double() for p in plain.parameters()]
    parts = [value.chunk(2)[RANK] if len(value.chunk(2)) > RANK else value[:0] for value in vector]
    for part, tensor in zip(parts, weights.shards.tensors, strict=True):
        assert part.shape == tensor.shape
    torch.testing.assert_close(weights.shards.norm(parts), plain_weights.shards.norm(vector))

    before = weights.snapshot()
    with torch.no_grad():
        differentiable_loss(model, batch)  # The root keeps gathered weights now.
    with weights.shifted(parts), plain_weights.shifted(vector):
        shifted = differentiable_loss(model, batch)
        expected = differentiable_loss(plain, batch)
        torch.testing.assert_close(shifted, expected, rtol=1e-9, atol=0)
        gradients = weights.shards.gradients(shifted)
        expected_gradients = plain_weights.shards.gradients(expected)
    norm = weights.shards.norm(gradients)
    torch.testing.assert_close(norm, plain_weights.shards.norm(expected_gradients))
    for tensor, saved in zip(weights.shards.tensors, before, strict=True):
        assert torch.equal(tensor, saved), "the shift must be undone to the last bit"
    with torch.no_grad():
        differentiable_loss(model, batch)
    doubled = [2 * value for value in before]
    weights.restore(doubled)
    with torch.no_grad():
        loss = differentiable_loss(model, batch)
        for parameter in plain.parameters():
            parameter.mul_(2)
        torch.testing.assert_close(loss, differentiable_loss(plain, batch), rtol=1e-9, atol=0)

    loss = differentiable_loss(model, batch)
    for change in (weights.shifted(parts), weights.trainable()):
        with pytest.raises(RuntimeError, match="between a forward pass"), change:
            pass
    with pytest.raises(RuntimeError, match="Set accumulated gradients aside"):
        loss.backward()
        weights.shards.gradients(differentiable_loss(model, batch))
    with pytest.raises(RuntimeError, match=r"end of Weights\.shifted"), weights.shifted(parts):
        loss = differentiable_loss(model, batch)
    for tensor, saved in zip(weights.shards.tensors, doubled, strict=True):
        assert torch.equal(tensor, saved), "restored all the same"
    del loss  # What is forgotten needs no backward pass.
    accumulated = [parameter.grad for parameter in parameters]
    assert all(gradient is not None for gradient in accumulated)
    with weights.trainable():
        assert all(parameter.grad is None for parameter in parameters)
        for _ in range(2):  # A second time: nothing may be left of the first.
            found = weights.shards.gradients(differentiable_loss(model, batch))
        assert all(gradient is not None for gradient in found)
    for parameter, gradient in zip(parameters, accumulated, strict=True):
        assert parameter.grad is gradient
    weights.shards.add_to_gradients(found, 0.5)  # type: ignore[arg-type]
    total = torch.nn.utils.get_total_norm([p.grad for p in parameters])  # type: ignore[misc]
    torch.testing.assert_close(total.full_tensor(), 1.5 * weights.shards.norm(found))  # type: ignore[attr-defined]


SCENARIOS = (
    shifts_are_not_lost,
    every_family_is_loaded_and_gathered,
    patcher_trains_and_resumes,
    hypergradients_by_differences,
    dropout_goes_on,
    a_signal_stops_both,
    a_checkpoint_in_the_background_is_of_its_step,
    a_full_disk_leaves_the_checkpoint_before,
    recomputing_changes_nothing,
    packing_changes_nothing,
)


def main() -> int:
    folder = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    outcome = {}
    with pytest.MonkeyPatch.context() as patch:
        make_llama_exact(patch)
        for scenario in SCENARIOS:
            try:
                scenario(folder)
            except BaseException:
                outcome[scenario.__name__] = traceback.format_exc()
                break  # The processes may be out of step.
            outcome[scenario.__name__] = "passed"
            print(scenario.__name__, flush=True)
    (folder / f"outcome-{RANK}.json").write_text(json.dumps(outcome))
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

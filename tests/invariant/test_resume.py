"""If these fail, a run that was interrupted and goes on is another run than one that was not.

Every defense is resumed in tests/contract; here, what is interrupted within an attack.
"""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.callbacks import RunCheckpoint
from patcher_pl.callbacks.checkpoint_files import AtomicCheckpointIO
from patcher_pl.defenses import SFT, Patcher
from patcher_pl.defenses.attack_source import AdaptiveRefresh
from patcher_pl.defenses.retention import KLToBase, RepresentationDistance
from patcher_pl.errors import CheckpointError, RunInterrupted
from patcher_pl.hypergradients import Adjoint
from patcher_pl.hypergradients.trajectories import FullState
from patcher_pl.models import LanguageModel, Lora
from patcher_pl.optim import AdamW
from tests.attack_table import ATTACKERS
from tests.tiny_runs import ATTACKER, SaveAt, adamw, assert_same, fit, snapshot

NUM_STEPS = 8


def decaying(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)


def make_sft(path, **options):
    return SFT(LanguageModel(path=str(path)), optimizer=adamw(), scheduler=decaying, **options)


def make_patcher(path, attacker=ATTACKER, lora=None, **options):
    return Patcher(
        LanguageModel(path=str(path), lora=lora),
        attacker,
        optimizer=adamw(),
        scheduler=decaying,
        refresh_every=3,
        **options,
    )


def make_lora_patcher(path, **options):
    attacker = FineTuningAttacker(num_steps=2, optimizer=AdamW(lr=1e-2), lora=Lora(rank=2))
    return make_patcher(path, attacker, lora=Lora(rank=2, dropout=0.1), **options)


def make_points_patcher(path, combine="at_random", lora=None, **options):
    attacker = FineTuningAttacker(
        num_steps=3, optimizer=AdamW(lr=1e-3), vector_steps=[1, 2, 3], lora=lora
    )
    adapters = options.pop("language_lora", None)
    return make_patcher(path, attacker, lora=adapters, combine_points=combine, **options)


def make_averaging_patcher(path, **options):
    return make_points_patcher(path, "average", Lora(rank=2), **options)


def make_low_memory_patcher(path, dtype="float32", **options):
    """Moments of the defender by torchao in 8 bits, those of attacks in bfloat16."""
    from torchao.optim import AdamW8bit

    return Patcher(
        LanguageModel(path=str(path), dtype=dtype),
        replace(ATTACKER, optimizer=AdamW(lr=1e-3, state_dtype="bfloat16")),
        # Blocks of which the embeddings of the tiny model are a multiple.
        optimizer=lambda parameters: AdamW8bit(parameters, lr=1e-3, block_size=32),
        scheduler=decaying,
        refresh_every=3,
        **options,
    )


def make_low_memory_half_patcher(path, **options):
    return make_low_memory_patcher(path, "bfloat16", **options)


@pytest.fixture
def _eager():
    """Torchao's steps as they are: compiled ones would take minutes."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("make", [make_low_memory_patcher, make_low_memory_half_patcher])
def test_moments_in_few_bytes_go_on_to_the_bit(llama, rows, tmp_path, make):
    """Wrong if a checkpoint could not be read safely, or held moments of other bits."""
    from torchao.optim.subclass_8bit import OptimState8bit

    checkpoint = tmp_path / "step.ckpt"
    torch.manual_seed(1)
    fit(make(llama), rows.module(), NUM_STEPS, callbacks=[SaveAt(5, checkpoint)])
    (saved,) = AtomicCheckpointIO().load_checkpoint(checkpoint, weights_only=True)[
        "optimizer_states"
    ]
    assert isinstance(saved["state"][0]["exp_avg"], OptimState8bit)
    assert_goes_on(make, llama, rows, checkpoint, plugins=[AtomicCheckpointIO()])
    # As two processes would have saved it.
    content = torch.load(checkpoint, weights_only=True)
    content["defense"]["random_states"] *= 2
    torch.save(content, checkpoint)
    reading = {"ckpt_path": checkpoint, "weights_only": True, "plugins": [AtomicCheckpointIO()]}
    with pytest.raises(CheckpointError, match="as many processes as saved them, 2, got 1"):
        fit(
            *(make(llama), rows.module(), 8),
            **{"callbacks": [RunCheckpoint(tmp_path / "new")], "enable_checkpointing": True},
            **reading,
        )


def assert_goes_on(make, path, rows, checkpoint, plugins=(), **options) -> None:
    """A run that goes on from `checkpoint` ends as one that was never interrupted."""
    torch.manual_seed(1)
    whole = make(path, **options)
    fit(whole, rows.module(), NUM_STEPS)
    torch.manual_seed(99)
    resumed = make(path, **options)
    reading = {"ckpt_path": checkpoint, "weights_only": True, "plugins": list(plugins)}
    fit(resumed, rows.module(), NUM_STEPS, **reading)
    assert_same(snapshot(resumed.model), snapshot(whole.model))
    assert resumed.cost == whole.cost
    if isinstance(whole, Patcher):
        assert len(resumed.attack_source.vectors) == len(whole.attack_source.vectors)
        pairs = zip(resumed.attack_source.vectors, whole.attack_source.vectors, strict=True)
        for ours, theirs in pairs:
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("make", "step"),
    [
        (make_patcher, 2),  # in the first round, before any attack
        (make_patcher, 5),  # in the middle of a round, and of an epoch
        (make_lora_patcher, 5),  # draws adapters and dropout masks
        (make_points_patcher, 5),  # has three vectors, and draws one
        (make_averaging_patcher, 5),
    ],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(llama, rows, tmp_path, make, step, accumulate):
    checkpoint = tmp_path / "step.ckpt"
    torch.manual_seed(1)
    interrupted = make(llama, accumulate_grad_batches=accumulate)
    fit(interrupted, rows.module(), NUM_STEPS, callbacks=[SaveAt(step, checkpoint)])
    assert interrupted.global_step == step
    assert_goes_on(make, llama, rows, checkpoint, accumulate_grad_batches=accumulate)


@pytest.mark.parametrize("step", [4, pytest.param(9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", sorted(ATTACKERS))
def test_attacks_that_differ_go_on_as_they_would_have(gpt2, rows, tmp_path, name, step):
    """With the vector, the moments and the draws of an uninterrupted run, whatever comes next."""
    checkpoint, options = tmp_path / "step.ckpt", {"refresh_every": 2}
    adaptive = (
        AdaptiveRefresh(tolerance=0.0, min_steps=1, factor=2.0) if name == "carried" else None
    )

    def make(path):
        return Patcher(
            LanguageModel(path=str(path)),
            ATTACKERS[name],
            optimizer=adamw(),
            adaptive_refresh=adaptive,
            **options,
        )

    torch.manual_seed(1)
    fit(make(gpt2), rows.module(), 12, callbacks=[SaveAt(step, checkpoint)])
    torch.manual_seed(1)
    whole, data = make(gpt2), rows.module()
    fit(whole, data, 12)
    torch.manual_seed(99)
    resumed, data_resumed = make(gpt2), rows.module()
    fit(resumed, data_resumed, 12, ckpt_path=checkpoint, weights_only=True)
    assert_same(snapshot(resumed.model), snapshot(whole.model))
    assert resumed.cost == whole.cost
    assert data_resumed.state_dict() == data.state_dict()
    source, expected = resumed.attack_source, whole.attack_source
    assert source.num_attacks == expected.num_attacks > 2
    assert source.refresh_every == expected.refresh_every
    assert source.carried.keys() == expected.carried.keys()
    assert bool(source.carried) == ATTACKERS[name].is_carried
    for kind, one in source.carried.items():
        other = expected.carried[kind]
        assert one.num_steps == other.num_steps
        assert all(torch.equal(a, b) for a, b in zip(one.vector, other.vector, strict=True))


@pytest.mark.parametrize("lora", [None, Lora(rank=2, dropout=0.1)], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("strategy", "step"),
    [
        (KLToBase, 2),
        pytest.param(KLToBase, 5, marks=pytest.mark.slow),
        pytest.param(RepresentationDistance, 5, marks=pytest.mark.slow),
    ],
)
def test_what_is_retained_is_the_model_before_the_interruption(
    gpt2, rows, tmp_path, strategy, step, lora
):
    """Wrong if the base model were that of the checkpoint, or benign batches began anew."""
    checkpoint = tmp_path / "step.ckpt"
    retain = strategy(data=rows.mixtures["val"], weight=0.5, attacked_weight=0.5)

    def make(path, **options):
        return make_points_patcher(
            *(path, "in_turn"),
            language_lora=lora,
            retain=retain,
            accumulate_grad_batches=2,
            **options,
        )

    torch.manual_seed(1)
    fit(make(gpt2), rows.module(), NUM_STEPS, callbacks=[SaveAt(step, checkpoint)])
    assert_goes_on(make, gpt2, rows, checkpoint)


class StopInSecondAttack(Callback):
    """Asks for a stop once the second attack has begun, and saves when the run ends by it."""

    def __init__(self, path) -> None:
        self.path = path

    def on_train_start(self, trainer, pl_module) -> None:
        attack = pl_module.attack_source.attacker.attack

        def interrupted(model, weights, batches, before_step):
            calls = iter([None])

            def stop_late() -> None:
                if pl_module.global_step == 6 and next(calls, "late") == "late":
                    pl_module.stop_requested = True
                before_step()

            return attack(model, weights, batches, stop_late)

        object.__setattr__(pl_module.attack_source.attacker, "attack", interrupted)

    def on_exception(self, trainer, pl_module, exception) -> None:
        assert isinstance(exception, RunInterrupted)
        assert pl_module.is_between_steps
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_run_stopped_in_an_attack_repeats_the_attack(model, rows, tmp_path, accumulate, request):
    """Both streams, and the generator, must hand out again what the cancelled step had taken."""
    path, checkpoint = request.getfixturevalue(model), tmp_path / "step.ckpt"
    points = [2, 3] if accumulate == 2 else None
    retain = KLToBase(data=rows.mixtures["val"]) if accumulate == 2 else None

    def make_attacker():
        return FineTuningAttacker(num_steps=3, optimizer=AdamW(lr=1e-3), vector_steps=points)

    torch.manual_seed(1)
    interrupted = make_patcher(
        path, make_attacker(), accumulate_grad_batches=accumulate, retain=retain
    )
    with pytest.raises(RunInterrupted):
        fit(interrupted, rows.module(), NUM_STEPS, callbacks=[StopInSecondAttack(checkpoint)])
    assert interrupted.global_step == 6

    def make(path, **options):
        return make_patcher(path, make_attacker(), retain=retain, **options)

    assert_goes_on(make, path, rows, checkpoint, accumulate_grad_batches=accumulate)


class StopInEstimate(Callback):
    """Asks for a stop at a call of `before_step` in the estimate of one defender step.

    Args:
        path: Where the checkpoint goes that is saved when the run ends by it.
        call: Which call, of all batches of the step (count, from 1).
    """

    def __init__(self, path, call: int) -> None:
        self.path, self.call = path, call

    def on_train_start(self, trainer, pl_module) -> None:
        check, calls = pl_module.check_for_stop, iter(range(1, self.call))

        def stop_late() -> None:
            if pl_module.global_step == 4 and next(calls, None) is None:
                pl_module.stop_requested = True
            check()

        pl_module.check_for_stop = stop_late

    def on_exception(self, trainer, pl_module, exception) -> None:
        assert isinstance(exception, RunInterrupted)
        assert pl_module.is_between_steps
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("call", [2, 5], ids=["in-the-attack", "on-the-way-back"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_run_stopped_in_an_estimate_repeats_it(model, rows, tmp_path, accumulate, call, request):
    """Three steps there and three back for every batch; gpt2 draws dropout masks for each."""
    path, checkpoint = request.getfixturevalue(model), tmp_path / "step.ckpt"

    def make(path, **options):
        attacker = FineTuningAttacker(num_steps=3, optimizer=AdamW(lr=1e-3))
        return Patcher(
            *(LanguageModel(path=str(path)), attacker),
            optimizer=adamw(),
            scheduler=decaying,
            refresh_every=2,
            hypergradient=Adjoint(store=FullState()),
            retain=KLToBase(data=rows.mixtures["val"]),
            **options,
        )

    torch.manual_seed(1)
    interrupted = make(path, accumulate_grad_batches=accumulate)
    # Of the step's last batch.
    stop = StopInEstimate(checkpoint, call + 6 * (accumulate - 1))
    with pytest.raises(RunInterrupted):
        fit(interrupted, rows.module(), NUM_STEPS, callbacks=[stop])
    assert interrupted.global_step == 4
    assert_goes_on(make, path, rows, checkpoint, accumulate_grad_batches=accumulate)


@pytest.mark.parametrize(
    ("writer", "reader", "message"),
    [
        (make_sft, make_patcher, "written by SFT, so Patcher cannot go on"),
        (make_patcher, make_sft, "written by Patcher, so SFT cannot go on"),
    ],
)
def test_the_checkpoint_of_another_defense_is_refused(
    llama, rows, tmp_path, writer, reader, message
):
    checkpoint = tmp_path / "step.ckpt"
    fit(writer(llama), rows.module(), 2, callbacks=[SaveAt(1, checkpoint)])
    with pytest.raises(CheckpointError, match=message):
        fit(reader(llama), rows.module(), 2, ckpt_path=checkpoint, weights_only=True)


def test_the_checkpoint_of_another_program_is_refused(llama, rows, tmp_path):
    checkpoint = tmp_path / "step.ckpt"
    fit(make_sft(llama), rows.module(), 2, callbacks=[SaveAt(1, checkpoint)])
    content = torch.load(checkpoint, weights_only=True)
    del content["defense"]
    torch.save(content, checkpoint)
    with pytest.raises(CheckpointError, match="written by another program"):
        fit(make_sft(llama), rows.module(), 2, ckpt_path=checkpoint, weights_only=True)

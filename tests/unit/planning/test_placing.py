"""Where a configuration places a run; what `fit` refuses, `plan` refuses."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.defenses import SFT, Patcher
from patcher_pl.defenses.replicated_strategy import ReplicatedStrategy
from patcher_pl.errors import ConfigError
from patcher_pl.hypergradients import Adjoint
from patcher_pl.hypergradients.hvp import FiniteDifference
from patcher_pl.hypergradients.trajectories import FullState
from patcher_pl.models import LanguageModel, Lora, Sharding
from patcher_pl.optim import AdamW
from patcher_pl.planning.placements import (
    OFFLOADED,
    VECTORS,
    can_shard,
    placement_of,
    settings_to_shard,
    sharding_for,
)
from patcher_pl.planning.tracker import Part

ATTACKER = FineTuningAttacker(num_steps=2, optimizer=AdamW(lr=1e-3))


def trainer(**changes):
    given = {"devices": 1, "num_nodes": 1, "strategy": "auto", "precision": None}
    return SimpleNamespace(**{**given, **changes})


def fsdp2(size=8, **changes):
    strategy = ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1)
    return trainer(**{"devices": size, "strategy": strategy, **changes})


def sft(**language_model):
    return SFT(language_model=LanguageModel(path="moon/root", **language_model))


def test_one_device_keeps_everything():
    found = placement_of(trainer(), sft(sharding=Sharding(cpu_offload=True)))
    assert (found.num_devices, found.sharded, found.on_host) == (1, False, frozenset())


def test_devices_are_counted_on_all_machines():
    found = placement_of(fsdp2(16, devices=[0, 1, 2, 3], num_nodes=4), sft())
    assert (found.num_devices, found.sharded, found.keeps_gathered) == (16, True, False)


def test_copies_are_counted():
    found = placement_of(fsdp2(16), sft(sharding=Sharding(num_replicas=4)))
    assert (found.num_devices, found.sharded, found.num_replicas) == (16, True, 4)
    exact = Patcher(LanguageModel(path="moon/root"), ATTACKER, hypergradient=Adjoint())
    found = placement_of(trainer(devices=4, strategy=ReplicatedStrategy()), exact)
    assert (found.num_devices, found.sharded, found.num_replicas) == (4, False, 4)
    assert placement_of(trainer(), sft()).num_replicas == 1


@pytest.mark.parametrize(
    ("language_model", "on_host"),
    [
        ({"weight_copies_on": "host"}, VECTORS),
        ({"sharding": Sharding(cpu_offload=True)}, OFFLOADED),
    ],
)
def test_what_waits_on_the_host_is_read(language_model, on_host):
    assert placement_of(fsdp2(), sft(**language_model)).on_host == on_host


def test_a_trajectory_on_the_host_is_read():
    store = FullState(device="cpu")
    defense = Patcher(LanguageModel(path="moon/root"), ATTACKER, hypergradient=Adjoint(store=store))
    assert placement_of(trainer(), defense).on_host == {Part.TRAJECTORY}


def test_layers_that_stay_gathered_are_read():
    kept = sft(sharding=Sharding(reshard_after_forward=False), gradient_checkpointing=True)
    found = placement_of(fsdp2(), kept)
    assert (found.keeps_gathered, found.checkpointing) == (True, True)
    assert not placement_of(trainer(), kept).keeps_gathered


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (trainer(devices=2), "needs a strategy that shards, got DDPStrategy"),
        (trainer(devices=2, strategy="ddp"), "needs a strategy that shards, got DDPStrategy"),
        (trainer(devices=2, strategy=FSDPStrategy()), "FSDP1"),
        (trainer(devices=2, strategy=ModelParallelStrategy()), "tensor_parallel_size"),
        (fsdp2(8, devices=4), "data_parallel_size must be .* 4, got 8"),
        (fsdp2(precision="bf16"), "FSDP2 has its own mixed precision, got 'bf16-mixed'"),
        (trainer(precision=16), "needs loss scaling"),
        (trainer(devices="auto"), "must be a number to plan for, got 'auto'"),
        (trainer(strategy="abacus"), "none of Lightning's strategies"),
    ],
)
def test_what_fit_refuses_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        placement_of(options, sft())


def test_copies_that_cannot_be_split_evenly_are_refused():
    with pytest.raises(ConfigError, match=r"num_replicas must divide .*, 16, got 3"):
        placement_of(fsdp2(16), sft(sharding=Sharding(num_replicas=3)))


def test_only_what_works_sharded_is_offered_on_several_devices():
    model = LanguageModel(path="moon/root")
    exact, differences = (
        Patcher(model, ATTACKER, hypergradient=hypergradient)
        for hypergradient in (Adjoint(), Adjoint(hvp=FiniteDifference()))
    )
    assert not can_shard(exact, Sharding())
    assert can_shard(differences, Sharding())
    assert not can_shard(differences, Sharding(param_dtype="bfloat16"))
    assert can_shard(Patcher(model, ATTACKER), Sharding(param_dtype="bfloat16"))
    assert can_shard(sft(lora=Lora(rank=2)), Sharding(param_dtype="bfloat16"))
    assert not can_shard(sft(lora=Lora(rank=2), dtype="bfloat16"), Sharding())


def test_autocast_becomes_the_mixed_precision_of_fsdp2():
    """Wrong if a remedy kept `bf16-mixed`, which FSDP2 runs are refused with."""
    autocast, model = trainer(precision="bf16-mixed"), LanguageModel(path="moon/root")
    wanted = Sharding(param_dtype="bfloat16", reduce_dtype="float32")
    assert sharding_for(autocast, model) == wanted
    assert "`trainer.precision: 32-true`" in settings_to_shard(autocast, model)
    assert settings_to_shard(trainer(), model) == []

"""If these fail, a run that cannot be right starts all the same, or dies without saying why."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning import Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from patcher_pl.attackers import ConcurrentAttacker, FineTuningAttacker, Member
from patcher_pl.callbacks import RunCheckpoint
from patcher_pl.defenses import SFT, Patcher
from patcher_pl.defenses.strategies import require_supported
from patcher_pl.errors import ConfigError
from patcher_pl.hypergradients import Adjoint, FirstOrder, Implicit, Truncated, Unrolled
from patcher_pl.hypergradients.hvp import FiniteDifference, ReverseOverReverse
from patcher_pl.models import LanguageModel, Lora, Sharding
from patcher_pl.optim import SGD, AdamW
from tests.concurrent_runs import concurrent
from tests.tiny_runs import ATTACKER, adamw, assert_same, fit, load, snapshot

DIFFERENCES = Adjoint(hvp=FiniteDifference())
SHARDABLE = [FirstOrder(), DIFFERENCES, Truncated(last_steps=1, adjoint=DIFFERENCES)]
NOT_SHARDABLE = [
    Adjoint(),
    Adjoint(hvp=ReverseOverReverse()),
    Truncated(last_steps=1),
    Implicit(hvp=FiniteDifference()),
    Unrolled(),
]


@pytest.fixture
def model(llama):
    return LanguageModel(path=str(llama))


def test_half_precision_with_loss_scaling_is_refused(model, rows):
    with pytest.raises(ConfigError, match=r"trainer\.precision: '16-mixed' .* Use `bf16-mixed`"):
        fit(SFT(model), rows.module(), 1, plugins=[MixedPrecision("16-mixed", "cpu")])


@pytest.mark.parametrize("hypergradient", [Adjoint(), Unrolled(), Implicit()])
def test_rounded_moments_are_not_differentiated(model, hypergradient):
    """Wrong if the exact derivative of another attack than the one that is run were trained on."""
    attacker = FineTuningAttacker(num_steps=2, optimizer=AdamW(lr=1e-3, state_dtype="bfloat16"))
    message = r"Patcher\.attacker\.optimizer\.state_dtype must be null .+, got 'bfloat16'\. Leave"
    with pytest.raises(ValueError, match=message):
        Patcher(model, attacker, hypergradient=hypergradient)
    Patcher(model, attacker, hypergradient=FirstOrder())


def trainer_of(strategy, devices=2, **options):
    return Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        **options,
    )


def two_shards(**options):
    settings = {"data_parallel_size": 2, "tensor_parallel_size": 1, **options}
    return ModelParallelStrategy(**settings)


def test_replicas_are_refused(model):
    """Wrong if every process then trained a model of its own."""
    message = r"trainer\.strategy: SFT on 2 devices .* DDPStrategy.*ModelParallelStrategy.*size: 2`"
    with pytest.raises(ConfigError, match=message):
        require_supported(SFT(model), trainer_of("ddp"))


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (ModelParallelStrategy(), r"tensor_parallel_size auto.*`data_parallel_size: 2`"),
        (
            two_shards(save_distributed_checkpoint=False),
            r"save_distributed_checkpoint must be true",
        ),
    ],
)
def test_other_ways_to_spread_a_model_are_refused(model, strategy, message):
    with pytest.raises(ConfigError, match=message):
        require_supported(SFT(model), trainer_of(strategy))


class CPUStrategy(FSDPStrategy):
    """FSDP1; Lightning refuses the class itself on a CPU."""


def fsdp1(**options):
    return CPUStrategy(**{"state_dict_type": "sharded", **options})


@pytest.mark.parametrize(
    ("strategy", "precision", "settings", "message"),
    [
        ({"state_dict_type": "full"}, "32-true", {}, r"state_dict_type must be `sharded`"),
        ({"sharding_strategy": "NO_SHARD"}, "32-true", {}, r"FULL_SHARD.*got NO_SHARD"),
        ({"cpu_offload": True}, "32-true", {}, r"FSDPStrategy\.cpu_offload must be left away"),
        ({"auto_wrap_policy": {SFT}}, "32-true", {}, r"auto_wrap_policy must be left away"),
        ({}, "bf16-mixed", {}, r"trainer\.precision: SFT with FSDPStrategy needs `32-true`"),
        ({}, "32-true", {"dtype": "bfloat16"}, r"dtype must be float32.*got bfloat16"),
        ({}, "32-true", {"sharding": Sharding(cpu_offload=True)}, r"cpu_offload.*FSDP2 can"),
        ({}, "32-true", {"lora": Lora()}, r"LanguageModel\.lora"),
    ],
)
def test_what_the_first_fsdp_cannot_do_is_refused(llama, strategy, precision, settings, message):
    defense = SFT(LanguageModel(path=str(llama), **settings))
    with pytest.raises(ConfigError, match=message):
        require_supported(defense, trainer_of(fsdp1(**strategy), precision=precision))


def test_hypergradients_are_refused_with_the_first_fsdp(model):
    """Wrong if one were computed from shards of flattened weights as if they were weights."""
    attacker = FineTuningAttacker(num_steps=2, optimizer=SGD(lr=0.1))
    patcher = Patcher(model, attacker, hypergradient=DIFFERENCES)
    with pytest.raises(ConfigError, match=r"must be FirstOrder with FSDPStrategy, got Adjoint"):
        require_supported(patcher, trainer_of(fsdp1()))
    require_supported(Patcher(model, attacker), trainer_of(fsdp1()))


def test_checkpoints_in_the_background_are_refused_with_the_first_fsdp(model, tmp_path):
    """Wrong if they were written as FSDP2 writes them: no run could go on from one."""
    checkpoint = RunCheckpoint(tmp_path, in_background=True)
    with pytest.raises(ConfigError, match=r"checkpoint_in_background: FSDPStrategy.*got true"):
        checkpoint.setup(trainer_of(fsdp1()), SFT(model), "fit")
    checkpoint.setup(trainer_of(two_shards()), SFT(model), "fit")


def test_half_precision_goes_through_the_sharding(model):
    trainer = trainer_of(two_shards(), precision="bf16-mixed")
    with pytest.raises(ConfigError, match=r"trainer\.precision: .*sharding\.param_dtype"):
        require_supported(SFT(model), trainer)


def test_what_fully_sharded_data_parallel_can_do_is_let_through(model):
    attacker = FineTuningAttacker(num_steps=2, optimizer=SGD(lr=0.1))
    for hypergradient in SHARDABLE:
        patcher = Patcher(model, attacker, hypergradient=hypergradient)
        require_supported(patcher, trainer_of(two_shards()))
    require_supported(SFT(model), trainer_of("auto", devices=1))


@pytest.mark.parametrize("estimator", NOT_SHARDABLE, ids=repr)
def test_estimators_that_differentiate_twice_are_refused_where_weights_are_sharded(
    model, estimator
):
    """FSDP2 would give no gradient at all, or that of other weights, without a word."""
    patcher = Patcher(model, ATTACKER, hypergradient=estimator)
    message = r"Patcher\.hypergradient: .*Adjoint with `hvp: .*FiniteDifference`"
    with pytest.raises(ConfigError, match=message):
        require_supported(patcher, trainer_of(two_shards()))


def test_differences_in_half_precision_are_refused(llama):
    model = LanguageModel(path=str(llama), sharding=Sharding(param_dtype="bfloat16"))
    patcher = Patcher(model, ATTACKER, hypergradient=SHARDABLE[1])
    with pytest.raises(ConfigError, match=r"param_dtype: differences of gradients in bfloat16"):
        require_supported(patcher, trainer_of(two_shards()))
    require_supported(Patcher(model, ATTACKER), trainer_of(two_shards()))


def test_attacks_that_sharded_weights_do_not_allow_are_refused(model):
    attacker = FineTuningAttacker(num_steps=2, optimizer=SGD(lr=0.1), trains="embeddings")
    with pytest.raises(ConfigError, match=r"Patcher\.attacker .*trains: all"):
        require_supported(Patcher(model, attacker), trainer_of(two_shards()))
    adapters = FineTuningAttacker(num_steps=2, optimizer=SGD(lr=0.1), lora=Lora(rank=2))
    require_supported(Patcher(model, adapters), trainer_of(two_shards()))


def test_attackers_elsewhere_are_refused_where_weights_are_sharded(model, tmp_path):
    """Before weights are loaded and a mailbox is made; also on one device with such a strategy."""
    defense = Patcher(model, concurrent(tmp_path / "mailbox"))
    message = r"Patcher\.attacker: a ConcurrentAttacker needs a defender on one device.*devices: 1`"
    for devices in (1, 2):
        strategy = two_shards(data_parallel_size=devices)
        with pytest.raises(ConfigError, match=message):
            require_supported(defense, trainer_of(strategy, devices))
    defense.trainer = trainer_of(two_shards())
    with pytest.raises(ConfigError, match=message):
        defense.configure_model()
    with pytest.raises(RuntimeError, match="configure_model"):
        _ = defense.model
    assert not (tmp_path / "mailbox").exists()


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_patcher_without_a_data_module_is_refused(model, rows):
    with pytest.raises(ConfigError, match=r"SafetyDataModule\.attack"):
        fit(Patcher(model, ATTACKER), [], 1)


def test_an_attack_that_diverges_is_refused_before_it_spoils_the_model(llama, model, rows):
    wild = FineTuningAttacker(num_steps=3, optimizer=SGD(lr=1e38), max_grad_norm=None)
    defense = Patcher(model, wild, optimizer=adamw(), num_sft_steps=0)
    with pytest.raises(ConfigError, match=r"diverged at defender step 0 .*attacker\.optimizer\.lr"):
        fit(defense, rows.module(), 2)
    assert_same(snapshot(defense.model), load(llama).state_dict())


def test_a_vector_cannot_be_fresher_than_it_is_used(model):
    """Wrong if the defender waited for ever for what nobody can deliver."""
    with pytest.raises(
        ValueError, match=r"max_staleness must be >= refresh_every - 1 = 4 .* got 3"
    ):
        Patcher(model, concurrent(Path("m"), max_staleness=3), refresh_every=5)


def test_concurrent_attacks_need_somebody_who_attacks(model, rows):
    alone = ConcurrentAttacker(population=[Member(attacker=ATTACKER)])
    with pytest.raises(ConfigError, match=r"ConcurrentAttacker\.launch: .* Set `launch: false`"):
        fit(Patcher(model, alone), rows.module(), 1)


def test_a_mailbox_without_room_is_refused_at_once(model, rows, tmp_path, monkeypatch):
    """And not when the first snapshot fills up /dev/shm, which may take the host along."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"mailbox: .* has 0\.0 GiB free; .* Enlarge it, or set"):
        fit(Patcher(model, concurrent(tmp_path / "mailbox")), rows.module(), 1)


def test_the_model_is_named_where_it_is_missing(model):
    with pytest.raises(RuntimeError, match="configure_model"):
        _ = SFT(model).model


@pytest.mark.parametrize(
    ("field", "value"),
    [("alpha", -0.1), ("alpha", 1.1), ("refresh_every", 0), ("num_sft_steps", -1)],
)
def test_bad_settings_of_patcher_are_refused(model, field, value):
    with pytest.raises(ValueError, match=rf"Patcher\.{field} must be .*, got {value}\. Use "):
        Patcher(model, ATTACKER, **{field: value})

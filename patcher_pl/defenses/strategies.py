"""Which of Lightning's strategies, batches and checkpoints a defense can be trained with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import ShardingStrategy

from patcher_pl.defenses.replicated_strategy import ReplicatedStrategy
from patcher_pl.errors import CheckpointError, ConfigError
from patcher_pl.hypergradients import FirstOrder, Hypergradient
from patcher_pl.models import Sharding
from patcher_pl.models.lora import without_adapters
from patcher_pl.models.packing import require_packing
from patcher_pl.models.replicas import mark_replicated
from patcher_pl.models.shards import Shards

if TYPE_CHECKING:
    from patcher_pl.defenses.base import Defense

_SHARDED = (
    "lightning.pytorch.strategies.ModelParallelStrategy with `data_parallel_size: {}` and "
    "`tensor_parallel_size: 1`, as in configs/strategies"
)


def shards(trainer: Trainer) -> bool:
    """Whether the trainer's strategy spreads the weights over processes."""
    return isinstance(trainer.strategy, (ModelParallelStrategy, FSDPStrategy))


def uses_fsdp1(trainer: Trainer) -> bool:
    """Whether it does so with FSDP1."""
    return isinstance(trainer.strategy, FSDPStrategy)


def replicates(trainer: Trainer) -> bool:
    """Whether several processes hold the whole model each."""
    return isinstance(trainer.strategy, ReplicatedStrategy) and trainer.world_size > 1


def over_processes(trainer: Trainer, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """The losses of a whole step, of which every process saw a part."""
    if trainer.world_size == 1 or not losses:
        return losses
    means = trainer.strategy.reduce(torch.stack(list(losses.values())), reduce_op="mean")
    return dict(zip(losses, means, strict=True))


def shared_out(model: Any, sharding: Sharding, trainer: Trainer) -> Any:
    """Returns a whole model as the processes of a trainer share it, unless that is with FSDP2."""
    if replicates(trainer):
        mark_replicated(without_adapters(model))
    if uses_fsdp1(trainer):
        return sharding.wrap(model, trainer.strategy.root_device)
    return model


def require_supported(defense: "Defense", trainer: Trainer) -> None:
    """Refuses what would be wrong or would fail hours later, before any compute is spent.

    Raises:
        ConfigError: If this defense cannot be trained by this trainer.
    """
    name, strategy, size = type(defense).__name__, trainer.strategy, trainer.world_size
    if "16" in trainer.precision and not trainer.precision.startswith("bf16"):
        raise ConfigError(
            f"trainer.precision: {trainer.precision!r} needs loss scaling, which the two backward "
            "passes of a defender step do not support. Use `bf16-mixed` or `32-true`."
        )
    _require_acceleration(defense, trainer)
    if defense.extrapolation is not None:
        defense.extrapolation.require_fits(defense.language_model)
    if isinstance(strategy, FSDPStrategy):
        _require_supported_fsdp1(defense, trainer, strategy)
        return
    if isinstance(strategy, ReplicatedStrategy):
        if size > 1:
            require_several_processes(defense)
        return
    if not isinstance(strategy, ModelParallelStrategy):
        if size > 1:
            raise ConfigError(
                f"trainer.strategy: {name} on {size} devices needs a strategy that shards, got "
                f"{type(strategy).__name__}. Use {_SHARDED.format(size)}, or `replicated` where every "
                "device has room for the whole model, or `trainer.devices: 1`."
            )
        return
    if strategy._tensor_parallel_size != 1 and (strategy._tensor_parallel_size, size) != (
        "auto",
        1,
    ):
        raise ConfigError(
            f"trainer.strategy: {name} shards data-parallel only, got tensor_parallel_size "
            f"{strategy._tensor_parallel_size} (Lightning's default is all devices). Use "
            f"{_SHARDED.format(size)}."
        )
    if strategy._data_parallel_size not in ("auto", size):
        raise ConfigError(
            "trainer.strategy: data_parallel_size must be trainer.devices times trainer.num_nodes, "
            f"{size}, got {strategy._data_parallel_size}. Change one of them."
        )
    if not strategy._save_distributed_checkpoint:
        raise ConfigError(
            "trainer.strategy: ModelParallelStrategy.save_distributed_checkpoint must be true, got "
            "false. Each process saves its part; the export in `model/` is a whole model anyway."
        )
    defense.language_model.sharding.require_divides(size)
    if trainer.precision != "32-true":
        raise ConfigError(
            f"trainer.precision: FSDP2 has its own mixed precision, got {trainer.precision!r}. Leave "
            "it at `32-true` and set model.init_args.language_model.sharding.param_dtype."
        )
    require_shardable(defense)


@dataclass(frozen=True, kw_only=True)
class OneDevice:
    """Says of a class of defenses that it cannot be trained by several processes.

    Args:
        why: What stands against it; completes "got a strategy for several: ".
        instead: A defense that can.
    """

    why: str
    instead: str


def require_shardable(defense: "Defense") -> None:
    """Refuses a defense or attacks that cannot work on sharded weights.

    Raises:
        ConfigError: If there are some.
    """
    name, model = type(defense).__name__, defense.language_model
    # Peft's adapters are float32 there, and FSDP2 reduces one number format per layer.
    if model.lora is not None and model.dtype == "bfloat16":
        raise ConfigError(
            "LanguageModel.dtype must not be bfloat16 where adapters are trained with a strategy that "
            "shards. Set `dtype: float32` and `sharding.param_dtype: bfloat16`, which computes in it."
        )
    require_several_processes(defense)
    if defense.attack_source is not None:
        defense.attack_source.require_shardable(name, model.sharding)


def require_several_processes(defense: "Defense") -> None:
    """Refuses a defense or attacks that several processes cannot train together.

    Raises:
        ConfigError: If it is one.
    """
    if defense.one_device is not None:
        raise ConfigError(
            f"trainer.strategy: {type(defense).__name__} works on one device only, got a strategy for "
            f"several: {defense.one_device.why}. Set `trainer.devices: 1` and no strategy, or use "
            f"{defense.one_device.instead}, which works sharded."
        )
    if defense.attack_source is not None:
        defense.attack_source.require_several_processes(type(defense).__name__)


def require_packable(defense: "Defense", trainer: Trainer) -> None:
    """Refuses packed batches that defense or model would get wrong, before any compute is spent.

    Raises:
        ConfigError: If the data is packed and that would be so.
    """
    data, setting = trainer.datamodule, "data.packing"  # type: ignore[attr-defined]
    if not getattr(data, "packing", False):
        return
    if not defense.supports_packing:
        raise ConfigError(
            f"{setting}: {type(defense).__name__} reads padded batches row by row. Set it to false."
        )
    device = Shards(defense.model, list(defense.model.parameters())).device
    with trainer.precision_plugin.forward_context():
        rows = [one.input_ids for one in data.safe_examples[:2]]
        require_packing(defense.model, rows, device, setting)


def require_readable(state: Mapping[str, Any], defense: "Defense") -> None:
    """Refuses what another defense has saved, or one whose strategy kept other parts.

    Args:
        state: Of the checkpoint.
        defense: That is to go on from it.

    Raises:
        CheckpointError: If it cannot.
    """
    own, writer = type(defense).__name__, state.get("class", "another program")
    if writer != own:
        raise CheckpointError(
            f"The checkpoint was written by {writer}, so {own} cannot go on from it. Give "
            f"--ckpt_path a checkpoint of {own}, or leave it away to start from the beginning."
        )
    size = len(state["random_states"])
    fsdp1 = state.get("fsdp1", False), uses_fsdp1(defense.trainer)
    if any(fsdp1) and not (all(fsdp1) and size == defense.trainer.world_size):
        raise CheckpointError(
            f"A run with FSDPStrategy can only go on with it and on as many devices; the "
            f"checkpoint was written by {size}{' with it' if fsdp1[0] else ''}. Use "
            "ModelParallelStrategy for runs that change their size."
        )


def _estimator_of(defense: "Defense") -> Hypergradient:
    source = defense.attack_source
    return FirstOrder() if source is None else source.hypergradient


def _require_acceleration(defense: "Defense", trainer: Trainer) -> None:
    model = defense.language_model
    if not (model.compile or model.liger):
        return
    if model.liger and trainer.strategy.root_device.type == "cpu":
        raise ConfigError(
            "LanguageModel.liger: Liger's kernels run on GPUs, and this run is on the CPU. Set it to "
            "false, or `trainer.accelerator: gpu`."
        )
    if model.compile and shards(trainer):
        raise ConfigError(
            "LanguageModel.compile: a model is compiled on one device only, got a strategy that "
            "shards it. Set it to false."
        )
    hypergradient = _estimator_of(defense)
    # What works on sharded weights takes no second derivative.
    if not hypergradient.works_sharded:
        field = "compile" if model.compile else "liger"
        raise ConfigError(
            f"LanguageModel.{field}: {type(hypergradient).__name__} as configured differentiates a "
            f"gradient, which such a model cannot. Set `{field}: false`, or use FirstOrder."
        )


def _require_supported_fsdp1(defense: "Defense", trainer: Trainer, strategy: FSDPStrategy) -> None:
    name, model = type(defense).__name__, defense.language_model
    instead = f"FSDP2 can: {_SHARDED.format(trainer.world_size)}."
    set_here = [
        field
        for field, value in {
            "auto_wrap_policy": strategy.kwargs.get("auto_wrap_policy"),
            "mixed_precision": strategy.mixed_precision,
            "activation_checkpointing": strategy._activation_checkpointing_kwargs,
            "cpu_offload": strategy.cpu_offload.offload_params,  # type: ignore[union-attr]
        }.items()
        if value
    ]
    if set_here:
        raise ConfigError(
            f"trainer.strategy: FSDPStrategy.{set_here[0]} must be left away. Set what there is in "
            "language_model.sharding and language_model.gradient_checkpointing."
        )
    if strategy.sharding_strategy is not ShardingStrategy.FULL_SHARD or trainer.world_size == 1:
        raise ConfigError(
            "trainer.strategy: FSDPStrategy must have sharding_strategy FULL_SHARD and at least 2 "
            f"devices, got {strategy.sharding_strategy.name} and {trainer.world_size}. "
            "On one device use no strategy."
        )
    if strategy._state_dict_type != "sharded":
        raise ConfigError(
            "trainer.strategy: FSDPStrategy.state_dict_type must be `sharded`, got "
            f"{strategy._state_dict_type!r}. The export in `model/` is a whole model anyway."
        )
    if trainer.precision != "32-true":
        raise ConfigError(
            f"trainer.precision: {name} with FSDPStrategy needs `32-true`, got "
            f"{trainer.precision!r}. Set model.init_args.language_model.sharding.param_dtype instead."
        )
    kept = str(strategy.precision_plugin._desired_input_dtype).removeprefix("torch.")
    if model.dtype != kept:
        raise ConfigError(
            f"LanguageModel.dtype must be {kept} with FSDPStrategy, which converts weights to it, "
            f"got {model.dtype}. {instead}"
        )
    if model.lora is not None:
        raise ConfigError(
            "LanguageModel.lora must be null with FSDPStrategy, whose units are frozen or trained as "
            f"a whole, got {model.lora}. {instead}"
        )
    if model.sharding.num_replicas != 1:
        raise ConfigError(
            "LanguageModel.sharding.num_replicas must be 1 with FSDPStrategy (FSDP1), got "
            f"{model.sharding.num_replicas}. {instead}"
        )
    if model.sharding.cpu_offload or not model.sharding.reshard_after_forward:
        raise ConfigError(
            "LanguageModel.sharding: FSDPStrategy (FSDP1) supports neither `cpu_offload: true` nor "
            f"`reshard_after_forward: false`. {instead}"
        )
    hypergradient = _estimator_of(defense)
    if not isinstance(hypergradient, FirstOrder):
        raise ConfigError(
            f"{name}.hypergradient must be FirstOrder with FSDPStrategy, got "
            f"{type(hypergradient).__name__}. {instead}"
        )
    source = defense.attack_source
    if source is not None and not source.attacker.works_with_fsdp1:
        raise ConfigError(
            f"{name}.attacker must work with FSDPStrategy, got {source.attacker}. Set `lora: null`. "
            f"{instead}"
        )
    require_shardable(defense)

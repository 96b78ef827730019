"""Where a configuration of `fit` keeps its weights, and what it may be changed to."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)

from patcher_pl.defenses import Defense
from patcher_pl.defenses.strategies import require_supported
from patcher_pl.errors import ConfigError
from patcher_pl.models import LanguageModel, Sharding
from patcher_pl.planning.attacks import Attacks
from patcher_pl.planning.placements import OFFLOADED, VECTORS, Placement
from patcher_pl.planning.tracker import Part

# Lightning's short names of precisions, as `str` shows them.
_PRECISIONS = {
    **{"None": "32-true", "32": "32-true", "64": "64-true"},
    **{"16": "16-mixed", "bf16": "bf16-mixed"},
}


def placement_of(trainer: Any, defense: Defense) -> Placement:
    """Returns where a Trainer of these options (strategy by name or built) would place a run.

    Raises:
        ConfigError: If `fit` would refuse the options, or the number of devices depends on the machine.
    """
    devices = len(trainer.devices) if isinstance(trainer.devices, list) else trainer.devices
    if not str(devices).isdigit():
        raise ConfigError(
            f"trainer.devices must be a number to plan for, got {devices!r}. "
            "Give it on the command line: --trainer.devices 8."
        )
    world_size = int(devices) * trainer.num_nodes
    strategy = _strategy(trainer.strategy, world_size)
    if isinstance(strategy, FSDPStrategy):
        raise ConfigError(
            "trainer.strategy: `plan` knows FSDP2, got FSDPStrategy (FSDP1), which needs about as much. "
            "Plan with a ModelParallelStrategy, as in configs/strategies."
        )
    described = {"strategy": strategy, "world_size": world_size, "precision": _precision(trainer)}
    require_supported(defense, SimpleNamespace(**described))  # type: ignore[arg-type]
    model, sharded = defense.language_model, isinstance(strategy, ModelParallelStrategy)
    attacks = Attacks.of(defense)
    store = None if attacks is None else getattr(attacks.hypergradient, "store", None)
    on_host = frozenset({Part.TRAJECTORY} if store and store.device != "model" else ())
    if model.weight_copies_on == "host":
        on_host |= VECTORS
    if sharded and model.sharding.cpu_offload:
        on_host |= OFFLOADED
    return Placement(
        num_devices=world_size,
        sharded=sharded,
        keeps_gathered=sharded and not model.sharding.reshard_after_forward,
        checkpointing=model.gradient_checkpointing,
        on_host=on_host,
    )


def sharding_for(trainer: Any, language_model: LanguageModel) -> Sharding:
    """Returns in which number formats FSDP2 would compute what the run computes now."""
    given = language_model.sharding
    if given.param_dtype is None and _precision(trainer) == "bf16-mixed":
        return replace(given, param_dtype="bfloat16", reduce_dtype="float32")
    return given


def settings_to_shard(trainer: Any, language_model: LanguageModel) -> list[str]:
    """Returns what to set, in words, for `sharding_for` to hold."""
    wanted, prefix = (
        sharding_for(trainer, language_model),
        "model.init_args.language_model.sharding",
    )
    if wanted == language_model.sharding:
        return []
    return [
        "`trainer.precision: 32-true`",
        f"`{prefix}.param_dtype: {wanted.param_dtype}`",
        f"`{prefix}.reduce_dtype: {wanted.reduce_dtype}`",
    ]


def can_shard(defense: Defense, sharding: Sharding) -> bool:
    """Whether the defense could be trained on split weights."""
    defense = deepcopy(defense)
    defense.language_model = replace(defense.language_model, sharding=sharding)
    try:
        defense.require_shardable()
    except ConfigError:
        return False
    return True


def _strategy(given: Any, world_size: int) -> Any:
    if not isinstance(given, str):
        return given
    if given == "auto":
        return SingleDeviceStrategy(device="cpu") if world_size == 1 else DDPStrategy()
    if given not in StrategyRegistry:
        raise ConfigError(
            f"trainer.strategy: {given!r} is none of Lightning's strategies. Use `auto` for one "
            "device, or one of configs/strategies for several."
        )
    return StrategyRegistry.get(given)


def _precision(trainer: Any) -> str:
    """The Trainer's precision by its full name."""
    return _PRECISIONS.get(str(trainer.precision), str(trainer.precision))

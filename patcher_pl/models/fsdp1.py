"""Models that are spread over processes with FSDP1, PyTorch's older way."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecision,
    StateDictType,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from patcher_pl.models.blocks import find_blocks
from patcher_pl.models.shards import watch_open_passes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WRAPPED = "_fsdp_wrapped_module."


def wrap(
    model: "PreTrainedModel",
    device: torch.device,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> FullyShardedDataParallel:
    """Returns a model whose every decoder layer is one unit of FSDP1, and what is left another.

    Around them lies a unit without weights: FSDP1 leaves those of the outermost unit gathered after
    a forward pass, and goes on with them whatever happens to the shards. As there are none, the
    parameters of the model are shards whenever no pass is under way.

    Args:
        model: Whole, with the same weights on every process.
        device: Where this process computes.
        param_dtype: Number format of gathered weights; None keeps that of the model.
        reduce_dtype: Number format in which gradients are averaged.
    """
    layers = {type(block) for block in find_blocks(model)}
    settings: dict[str, Any] = {"use_orig_params": True, "device_id": device}
    if param_dtype is not None or reduce_dtype is not None:
        settings["mixed_precision"] = MixedPrecision(param_dtype, reduce_dtype)
    inner = FullyShardedDataParallel(model, auto_wrap_policy=ModuleWrapPolicy(layers), **settings)
    wrapped = FullyShardedDataParallel(inner, **settings)
    # On the outermost module, whose output carries the logits of the whole pass.
    watch_open_passes(wrapped)
    return wrapped


def uses_fsdp1(model: nn.Module) -> bool:
    """Whether `wrap` made the model."""
    return isinstance(model, FullyShardedDataParallel)


def unwrapped(model: Any) -> "PreTrainedModel":
    """Returns the model within the units that lie around all of it."""
    while isinstance(model, FullyShardedDataParallel):
        model = model.module
    return model


def whole_state(model: FullyShardedDataParallel) -> dict[str, Tensor]:
    """Returns all weights, by their names in a plain model; all processes must call it.

    They are in host memory, and on the first process alone unless the model is.
    """
    # On a CPU, "offloaded" tensors would share memory that FSDP1 frees.
    moves = next(model.parameters()).device.type != "cpu"
    config = FullStateDictConfig(offload_to_cpu=moves, rank0_only=moves)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, config):
        return model.state_dict()


def without_units(name: str) -> str:
    """Returns the name of a parameter or buffer as in a plain model."""
    return name.replace(_WRAPPED, "")

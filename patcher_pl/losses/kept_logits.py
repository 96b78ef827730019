"""Whether a model computes the logits of chosen positions only."""

import inspect
from functools import lru_cache
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel


def keeps_logits(model: nn.Module) -> bool:
    """Whether `logits_to_keep` may be handed to the model; with a large vocabulary it saves most."""
    return _takes(type(innermost(model)), "logits_to_keep")


def takes_positions(model: nn.Module) -> bool:
    """Whether `position_ids` may be handed to the model."""
    return _takes(type(innermost(model)), "position_ids")


def innermost(model: Any) -> Any:
    """Returns the Hugging Face model within what FSDP1 and PEFT put around it."""
    while isinstance(model, FullyShardedDataParallel):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@lru_cache
def _takes(kind: type[nn.Module], name: str) -> bool:
    return name in inspect.signature(kind.forward).parameters

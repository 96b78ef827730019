"""Low-rank adapters, through peft."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from patcher_pl.models.peers import compute_device
from patcher_pl.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adaptation of linear layers.

    Args:
        rank: Rank of each update (count, >= 1).
        alpha: Scale; the update is multiplied by alpha / rank (> 0).
        dropout: Dropout on the adapter's input (in [0, 1)).
        targets: Names of the layers to adapt; None adapts every linear layer but the output head.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Hu et al., 2021, https://arxiv.org/abs/2106.09685.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        require(self, self.rank >= 1, "rank", ">= 1", "Use `lora: null` to train every weight.")
        require(self, self.alpha > 0, "alpha", "> 0", "Twice the rank is a common choice.")
        require(self, 0 <= self.dropout < 1, "dropout", "in [0, 1)", "Use 0 for no dropout.")

    def attach(self, model: "PreTrainedModel") -> Any:
        """Wraps `model` in place into a `peft.PeftModel` whose adapters alone are trainable.

        Raises:
            ValueError: If `targets` names no layer of the model (peft's message lists them).
        """
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft takes fractions too
            lora_dropout=self.dropout,
            target_modules="all-linear" if self.targets is None else self.targets,
            # GPT-2's layers keep their weights transposed; peft warns unless it is told.
            fan_in_fan_out=_uses_conv1d(model),
            task_type="CAUSAL_LM",
        )
        if getattr(model, "is_activation_checkpointing", False):
            # With frozen embeddings, checkpointed blocks would see no input that needs a gradient,
            # and make none.
            model.enable_input_require_grads()
        with _whole_shapes(model):
            return get_peft_model(model, config)


def without_adapters(model: nn.Module) -> Any:
    """Returns the model that adapters are attached to, with them in its layers; any other as it is."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def attached_like(model: nn.Module, plain: "PreTrainedModel") -> Any:
    """Attaches to `plain` fresh adapters as `model` has them, if any, in place."""
    from peft import PeftModel, get_peft_model

    return (
        get_peft_model(plain, model.active_peft_config) if isinstance(model, PeftModel) else plain
    )


def merged_copy(model: nn.Module) -> "PreTrainedModel":
    """Returns an independent copy of `model` with its adapters, if any, merged into the weights."""
    from peft import PeftModel

    copy: Any = deepcopy(model)
    return copy.merge_and_unload() if isinstance(copy, PeftModel) else copy


def plain_name(name: str) -> str | None:
    """The name that a parameter has without adapters; None for a parameter of an adapter."""
    if ".lora_" in name:
        return None
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


@contextmanager
def _whole_shapes(model: nn.Module) -> Iterator[None]:
    """Shows peft whole weights in the place of sharded ones, which it would take for another layout.

    What it sees has the shape, and no memory of its own. Adapters are whole on every process, and
    where the model computes.
    """
    device = compute_device(model)
    sharded = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    for module, name, parameter in sharded:
        shown = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
        module._parameters[name] = nn.Parameter(shown)
    try:
        yield
    finally:
        for module, name, parameter in sharded:
            parameter.requires_grad_(False)  # As peft does with what it sees.
            module._parameters[name] = parameter


def _uses_conv1d(model: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())

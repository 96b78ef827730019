"""A model that is lent to somebody who may do anything to it, and comes back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patcher_pl.models.shards import part_of, reshard

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def lent(model: nn.Module, *, keeps_values: bool = True) -> Iterator["PreTrainedModel"]:
    """Lends the model itself, adapters merged into it; afterwards it is as before to the last bit.

    Weights, buffers, modules, hooks, modes, what is trainable, gradients and configurations are put
    back, whatever was done to them. No second copy is made where the model computes: released
    weights, of a spread model this process's part of them, wait in host memory. What was compiled
    runs as it is written meanwhile, since it may become something else.

    Args:
        model: Plain, with adapters, or spread with FSDP2.
        keeps_values: Save the values of the weights, too; off where nobody will change them.

    Yields:
        The plain model.
    """
    from peft import PeftModel

    reshard(model)  # Or the root's parameters might be gathered copies, soon to be dropped.
    kept = _Kept.of(model, keeps_values)
    target: Any = model
    try:
        if isinstance(model, PeftModel):
            target = model.merge_and_unload()  # type: ignore[operator]
        yield target
    finally:
        reshard(target)
        kept.put_back()


@dataclass(frozen=True)
class _Kept:
    """Everything about a model that somebody might change.

    Args:
        attributes: Of modules and configurations, with what the containers among them hold.
        tensors: Parameters and buffers with their values, in host memory.
        parameters: Parameters with what is to be done with them, and their gradients.
    """

    attributes: list[tuple[Any, dict[str, Any], dict[str, Any]]]
    tensors: list[tuple[Tensor, Tensor]]
    parameters: list[tuple[nn.Parameter, bool, Tensor | None]]

    @classmethod
    def of(cls, model: nn.Module, keeps_values: bool) -> "_Kept":
        modules = list(model.modules())
        configs = {
            id(config): config
            for module in modules
            if (outer := getattr(module, "config", None)) is not None and hasattr(outer, "__dict__")
            for config in (outer, *_inner_configs(outer))
        }
        parameters = list(model.parameters())
        kept = cls(
            [
                (owner, dict(vars(owner)), _contents(owner))
                for owner in (*modules, *configs.values())
            ],
            [
                (part, part.to("cpu", copy=True))
                for tensor in (*parameters, *model.buffers())
                if keeps_values and not tensor.is_meta
                for part in [part_of(tensor.detach())]
            ],
            [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters],
        )
        for parameter in parameters:
            parameter.grad = None
        for module in modules:
            module._compiled_call_impl = None
        return kept

    def put_back(self) -> None:
        # First the modules: they hold the parameters again from here on.
        for owner, attributes, contents in self.attributes:
            own = vars(owner)
            own.clear()
            own.update(attributes)
            for name, content in contents.items():
                # The same container as before: handles of hooks know it.
                own[name].clear()
                extend = own[name].extend if isinstance(content, list) else own[name].update
                extend(content)
        with torch.no_grad():
            for tensor, value in self.tensors:
                tensor.copy_(value)
        for parameter, requires_grad, gradient in self.parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        torch.clear_autocast_cache()


def _contents(owner: Any) -> dict[str, Any]:
    return {
        name: value.copy()
        for name, value in vars(owner).items()
        if isinstance(value, dict | set | list)
    }


def _inner_configs(config: Any) -> list[Any]:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return [] if text is config else [text]

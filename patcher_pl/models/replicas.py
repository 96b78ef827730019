"""Whole copies of a model, one on every process, that are trained as one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

_MARK, _DIVIDED = "_patcher_pl_replicated", "_patcher_pl_work_is_divided"


@torch.no_grad()
def agree(model: nn.Module) -> None:
    """Gives weights and buffers the values that they have on the first process."""
    for tensor in (*model.parameters(), *model.buffers()):
        distributed.broadcast(tensor, src=0)


def mark_replicated(model: nn.Module) -> None:
    """Notes that every process holds this model whole; adapters around it may come and go."""
    setattr(model, _MARK, True)


def is_replicated(model: nn.Module) -> bool:
    """Whether every process holds this model, or the one within adapters, whole."""
    return _marked(model) is not None


@contextmanager
def divided(model: nn.Module) -> Iterator[bool]:
    """Whether this is the outermost such block, in which the processes may divide the work."""
    marked = _marked(model)
    if marked is None or getattr(marked, _DIVIDED, False):
        yield False
        return
    setattr(marked, _DIVIDED, True)
    try:
        yield True
    finally:
        delattr(marked, _DIVIDED)


def _marked(model: nn.Module) -> nn.Module | None:
    return next((module for module in model.modules() if getattr(module, _MARK, False)), None)


def averaged_with_graph(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns the mean over the processes of what each found, differentiable any number of times.

    With L_i the loss of process i, the mean over i of d L_i / d theta, which each finds by its own
    backward pass, is then the derivative of the mean of the losses, wherever averages lie between.
    """
    places = [place for place, gradient in enumerate(gradients) if gradient is not None]
    if not places:
        return list(gradients)
    # One node for all: collectives have to come in the same order everywhere.
    means: Any = _Average.apply(*(gradients[place] for place in places))
    result: list[Tensor | None] = [None] * len(gradients)
    for place, mean in zip(places, means, strict=True):
        result[place] = mean
    return result


class _Average(torch.autograd.Function):
    """The mean over the processes; it is its own derivative."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(averaged(tensors))  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _Average.apply(*gradients)


def averaged(tensors: Sequence[Tensor | None], group: Any = None) -> list[Tensor | None]:
    """Returns the mean over the processes of a group (all of them) of each tensor; None stays None.

    Which are None has to be the same everywhere.
    """
    # Copies: what autograd returns may be in use elsewhere, or expanded.
    own = [
        None if one is None else one.detach().clone(memory_format=torch.contiguous_format)
        for one in tensors
    ]
    given = [one for one in own if one is not None]
    waiting = [distributed.all_reduce(one, group=group, async_op=True) for one in given]
    for one, work in zip(given, waiting, strict=True):
        work.wait()  # type: ignore[union-attr]
        one.div_(distributed.get_world_size(group))
    return own

"""The processes that share one model, and how they divide what each could do alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.models.replicas import divided, is_replicated

Item = TypeVar("Item")
Result = TypeVar("Result")

_SHARDING = "_patcher_pl_sharding"


class Peers:
    """Processes that do the same thing at the same time, until they divide it.

    All must call the methods in the same order.

    Args:
        size: How many there are (>= 1); they are all processes of `torch.distributed`.
    """

    def __init__(self, size: int = 1) -> None:
        self.size = size
        self.rank = distributed.get_rank() if size > 1 else 0

    @classmethod
    def of(cls, model: nn.Module) -> "Peers":
        """Those that hold the model together, or each a copy of it; one alone for any other model."""
        return cls(distributed.get_world_size() if is_shared(model) else 1)

    def first(self, function: Callable[[], Result]) -> Result:
        """Returns on every process what `function` returns on the first, which alone calls it.

        Raises:
            PatcherError: On all, if it is raised on the first. Any other error is raised there as it
                is, and as a RuntimeError on the others.
        """
        if self.size == 1:
            return function()
        message: list[Any] = [None, None]
        if self.rank == 0:
            try:
                message[0] = function()
            except Exception as error:
                known = isinstance(error, PatcherError | OSError)
                failure = error if known else RuntimeError(f"{type(error).__name__}: {error}")
                distributed.broadcast_object_list([None, failure], src=0)
                raise
        distributed.broadcast_object_list(message, src=0)
        if message[1] is not None:
            raise message[1]
        return message[0]

    def divided(
        self, items: Sequence[Item], function: Callable[[list[Item]], list[Result]]
    ) -> list[Result]:
        """Returns what `function` makes of all items, in their order; each process does its share."""
        if self.size == 1:
            return function(list(items))
        own = list(items[self.rank :: self.size])
        parts: list[Any] = [None] * self.size
        distributed.all_gather_object(parts, function(own) if own else [])
        found: list[Any] = [None] * len(items)
        for rank, part in enumerate(parts):
            found[rank :: self.size] = part
        return found

    def total(self, value: float, device: torch.device) -> float:
        """Sum over the processes."""
        if self.size == 1:
            return value
        summed = torch.tensor(value, dtype=torch.float64, device=device)
        distributed.all_reduce(summed)
        return float(summed)


def is_spread(model: nn.Module) -> bool:
    """Whether FSDP2 spreads the model, or the model within adapters, over processes."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_shared(model: nn.Module) -> bool:
    """Whether several processes train and attack the model together, in parts or as copies."""
    return is_spread(model) or is_replicated(model)


def is_whole(model: nn.Module) -> bool:
    """Whether this process has every weight now, so that it can run the model by itself."""
    return not any(isinstance(parameter, DTensor) for parameter in model.parameters())


def compute_device(model: nn.Module) -> torch.device:
    """Where the model computes; shards may wait in host memory meanwhile."""
    for parameter in model.parameters():
        if isinstance(parameter, DTensor) and parameter.device_mesh.device_type != "cpu":
            kind = parameter.device_mesh.device_type
            return torch.device(kind, torch.get_device_module(kind).current_device())
    return next(model.parameters()).device


@contextmanager
def gathered_here(model: nn.Module) -> Iterator[Peers]:
    """Gathers a spread model on every process for the length of the block, where it has room.

    Of a replicated model every process has a copy as it is.

    Weights are those that the model computes with (`Sharding.param_dtype`); changes of them are
    lost. Where there is no room, or `Sharding.answers` says so, they stay shards, and whatever runs
    the model has to be done by all processes alike.

    Yields:
        Who may divide the work: each process can run the model by itself. One alone where it is
        not spread, where all have to do the same, and within another such block, whose work may
        have been divided already.
    """
    spread = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if is_whole(model):
        with divided(model) as may_divide:
            yield Peers.of(model) if may_divide else Peers()
        return
    sharding = getattr(spread[0], _SHARDING)
    if not _has_room(model, sharding):
        yield Peers()
        return
    # Streams and groups are set up by the first forward pass, which may not have been yet.
    spread[0]._get_fsdp_state()._lazy_init()
    try:
        for module in spread:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield Peers.of(model)
    finally:
        for module in spread:
            # The root keeps its own weights gathered from a forward pass to the next.
            keeps = module is spread[0] or not sharding.reshard_after_forward
            module.set_reshard_after_forward(not keeps, recurse=False)
            module.reshard()


def require_whole(model: nn.Module, what: str) -> None:
    """Refuses what cannot be done on shards.

    Raises:
        ConfigError: If some weights are elsewhere.
    """
    if not is_whole(model):
        raise ConfigError(
            f"{what} needs the whole model on every process, which has no room for it (or "
            "`sharding.answers: shards` forbids it). Leave it away, or use larger devices."
        )


def remember(model: nn.Module, sharding: Any) -> None:
    """Notes how a model was spread, for `gathered_here`."""
    setattr(model, _SHARDING, sharding)


def _has_room(model: nn.Module, sharding: Any) -> bool:
    if sharding.answers != "auto":
        return sharding.answers == "whole"
    device = compute_device(model)
    if device.type == "cpu":
        return True
    name = sharding.param_dtype
    size = sum(
        parameter.numel() * (getattr(torch, name).itemsize if name else parameter.itemsize)
        for parameter in model.parameters()
    )
    free, _ = torch.get_device_module(device.type).mem_get_info(device)
    # Answers need room, too. All must agree: the one with the least decides.
    least = torch.tensor(free, dtype=torch.float64, device=device)
    distributed.all_reduce(least, op=distributed.ReduceOp.MIN)
    return size < 0.6 * float(least)

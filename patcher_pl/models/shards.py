"""Parameters as plain tensors to calculate with, whether they are whole, sharded or replicated."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from patcher_pl.models.replicas import averaged, averaged_with_graph, is_replicated

_WATCH = "_patcher_pl_open_passes"


class Shards:
    """What this process holds of some parameters of a model.

    `tensors` share memory with the parameters: whole weights on one process, this process's part of
    each where FSDP shards them (with FSDP1 often nothing of one, and all of another). Everything element-wise is done on them alone, and what is summed
    over all weights is summed over the processes too (`total`, `norm`): plain tensors and sharded
    ones must not meet in one operation.

    Whole parameters beside sharded ones (adapters, vectors of a prompt), and those of a replicated
    model, are the same on all processes, and their gradients are averaged.

    All processes must call the methods in the same order.

    Args:
        model: Module that owns the parameters.
        parameters: Those to calculate with; all whole, or all sharded.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        first = self.parameters[0]
        others = (other for other in model.parameters() if isinstance(other, DTensor))
        around = first if isinstance(first, DTensor) else next(others, None)
        self._mesh = None if around is None else around.device_mesh
        self._group, self._peers = None, None
        if self._mesh is not None:
            # A second dimension is that of replicas; the last one holds the model together.
            members = self._mesh.get_group(self._mesh.ndim - 1)
            self._group = members if isinstance(first, DTensor) else None
            self._peers = members if self._mesh.ndim == 1 else distributed.group.WORLD
        elif is_replicated(model):
            self._peers = distributed.group.WORLD
        elif isinstance(model, FullyShardedDataParallel):
            # FSDP1's parameters are plain tensors; only the module knows who holds the rest.
            self._group = self._peers = model.process_group
        self._model = model

    @property
    def tensors(self) -> list[Tensor]:
        """The parts, wherever the model is now: moving it gives its parameters other memory."""
        return [part_of(parameter.detach()) for parameter in self.parameters]

    @property
    def is_sharded(self) -> bool:
        """Whether other processes hold the rest."""
        return self._group is not None

    @property
    def num_peers(self) -> int:
        """Processes whose gradients are averaged, each of a batch of its own (count, >= 1)."""
        return 1 if self._peers is None else self._peers.size()

    @property
    def device(self) -> torch.device:
        """Where the model computes; offloaded shards wait elsewhere."""
        if self._mesh is None or self._mesh.device_type == "cpu":
            return self.parameters[0].device
        module = torch.get_device_module(self._mesh.device_type)
        return torch.device(self._mesh.device_type, module.current_device())

    @property
    def reduction(self) -> Callable[[Tensor], Tensor] | None:
        """`total` where there is something to sum over, for the functions of `optim`."""
        return self.total if self.is_sharded else None

    @torch.no_grad()
    def agree(self) -> None:
        """Gives whole parameters beside sharded ones the values that the first process has."""
        if self._peers is not None and self._group is None:
            for tensor in self.tensors:
                distributed.broadcast(tensor, group_src=0, group=self._peers)

    @contextmanager
    def changing(self) -> Iterator[list[Tensor]]:
        """Lends the tensors to be changed in place.

        The root of an FSDP2 model keeps gathered weights after a forward pass, and would go on with
        them: they are dropped. So are the casts that autocast keeps until its context ends.
        """
        if self._mesh is not None:
            reshard(self._model)
        with torch.no_grad():
            yield self.tensors
        torch.clear_autocast_cache()

    def require_no_open_pass(self, action: str) -> None:
        """Refuses a change that a backward pass to come would mistake for the weights of its forward.

        On one device autograd notices by itself; with FSDP the gradient would be silently wrong.

        Raises:
            RuntimeError: If a forward pass of the sharded model still waits for its backward pass.
        """
        if self.is_sharded and getattr(self._model, _WATCH, ()):
            raise RuntimeError(
                f"{action} must not come between a forward pass of a sharded model and its backward "
                "pass: the gradient would be wrong without a sign. Call backward first."
            )

    def gradients(self, loss: Tensor) -> list[Tensor | None]:
        """Returns this process's part of the gradient, averaged over the processes.

        None where the loss does not depend on a parameter. Where parameters are sharded, no others
        of the model may require gradients. Leaves every `.grad` at None.

        Raises:
            RuntimeError: If sharded parameters hold gradients already, which would be mixed up.
        """
        if self._mesh is None and self._group is None:
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            return self.averaged(found)
        # `autograd.grad` finds nothing: the graph is one of gathered weights, which FSDP's hooks
        # reduce into `.grad` of the sharded ones. (`model.parameters()` may be gathered ones now.)
        if any(parameter.grad is not None for parameter in self.parameters):
            raise RuntimeError(
                "Shards.gradients needs every .grad of the model to be None. Set accumulated "
                "gradients aside first, as Weights.trainable does."
            )
        # Hooks gather, reduce and write `.grad`; it is emptied again, so that callers see no
        # difference.
        loss.backward()
        found = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        parts = [None if gradient is None else part_of(gradient) for gradient in found]
        return self.averaged(parts)

    def averaged(self, vector: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Returns the mean over the processes, where each has found all of a vector by itself.

        None where the loss did not depend on a parameter, which is so everywhere. What FSDP has
        averaged already comes back as it is.
        """
        if self._peers is None or self._group is not None:
            return list(vector)
        return averaged(vector, self._peers)

    def averaged_with_graph(self, vector: Sequence[Tensor | None]) -> list[Tensor | None]:
        """As `averaged`, and can be differentiated."""
        return list(vector) if self._peers is None else averaged_with_graph(vector)

    def average_gradients(self) -> None:
        """Averages every `.grad` of whole parameters over the processes, as FSDP does with its own."""
        if self._peers is None or self._group is not None:
            return
        means = averaged([parameter.grad for parameter in self.parameters], self._peers)
        for parameter, mean in zip(self.parameters, means, strict=True):
            parameter.grad = mean

    def add_to_gradients(self, gradients: Sequence[Tensor], weight: float) -> None:
        """Adds `weight` times what `gradients` holds of each gradient to every `.grad`."""
        for parameter, part in zip(self.parameters, gradients, strict=True):
            if not parameter.requires_grad:
                continue
            scaled: Tensor = part * weight
            if isinstance(parameter, DTensor):
                scaled = DTensor.from_local(
                    scaled,
                    parameter.device_mesh,
                    parameter.placements,
                    # A check would be one more communication per parameter, of what is known to
                    # hold.
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
            parameter.grad = scaled if parameter.grad is None else parameter.grad + scaled

    @torch.no_grad()
    def total(self, value: Tensor) -> Tensor:
        """Returns the sum over the processes of what each found for its part."""
        if self._group is None:
            return value
        return self._sum(value, self._group).to(value.device)

    @torch.no_grad()
    def total_of_batches(self, value: Tensor) -> Tensor:
        """Returns the sum over the processes of what each found for its rows, whatever it holds."""
        return value if self._peers is None else self._sum(value, self._peers).to(value.device)

    def mean(self, value: Tensor) -> float:
        """Returns the mean over the processes, of a loss for example."""
        if self._peers is None:
            return float(value.detach())
        return float(self._sum(value, self._peers)) / self.num_peers

    def _sum(self, value: Tensor, group: Any) -> Tensor:
        # Where shards wait in host memory, the group still speaks through the device.
        summed = value.detach().clone().to(self.device)
        distributed.all_reduce(summed, group=group)
        return summed

    @torch.no_grad()
    def norm(self, vector: Sequence[Tensor | None]) -> Tensor:
        """Euclidean norm of a vector that the processes hold in parts; a scalar."""
        own = nn.utils.get_total_norm([part for part in vector if part is not None])
        return own if self._group is None else self.total(own.square()).sqrt()

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scales every `.grad` so that their norm is at most `max_norm`; returns it as it was."""
        if self._mesh is not None and self.is_sharded:
            norm: Any = nn.utils.clip_grad_norm_(self.parameters, max_norm)
            return norm.full_tensor()
        norm = self.norm([parameter.grad for parameter in self.parameters])
        nn.utils.clip_grads_with_norm_(self.parameters, max_norm, norm)
        return norm


def reshard(model: nn.Module) -> None:
    """Drops gathered weights of FSDP2, so that a module's parameters are the sharded ones again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def part_of(tensor: Tensor) -> Tensor:
    """Returns what this process holds of a tensor, sharing memory: all of it unless sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Gathers a tensor where its mesh computes, on all processes that share it; others are returned."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Shards that wait in host memory cannot be gathered there: NCCL does not know it.
    found: Any = tensor.to(tensor.device_mesh.device_type)
    return found.full_tensor()


def watch_open_passes(model: nn.Module) -> None:
    """Lets `Shards.require_no_open_pass` know of forward passes that wait for a backward pass."""
    tokens: WeakSet[_Token] = WeakSet()
    setattr(model, _WATCH, tokens)

    def watch(_: nn.Module, __: Any, output: Any) -> Any:
        # Evaluation leaves no graph, so nothing waits.
        if torch.is_grad_enabled() and output.logits.requires_grad:
            token = _Token()
            tokens.add(token)
            output.logits = _Watched.apply(output.logits, token, tokens)
        return output

    model.register_forward_hook(watch)


class _Token:
    """Lives as long as the graph of one forward pass."""


class _Watched(torch.autograd.Function):
    """The identity; takes its token off the list when the backward pass begins."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token: _Token, tokens: "WeakSet[_Token]") -> Tensor:
        ctx.token, ctx.tokens = token, tokens
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.tokens.discard(ctx.token)
        return gradients[0], None, None

"""Recomputation of decoder blocks under forward differentiation.

`torch.utils.checkpoint` knows nothing of dual numbers. Here a block becomes one node of the graph,
whose inputs and outputs are primals and tangents side by side, and whose backward pass computes the
block once more.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from patcher_pl.hypergradients.composites import Composites, SplitDuals
from patcher_pl.models.blocks import find_blocks
from patcher_pl.randomness import RandomState, kept_random_state


@contextmanager
def rematerialized(model: nn.Module) -> Iterator[None]:
    """Keeps no activations within blocks for the length of the block.

    To be entered before parameters are substituted, inside a dual level.
    """
    blocks = find_blocks(model)
    try:
        for block in blocks:
            block.forward = _wrapped(block)  # type: ignore[method-assign]
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


@dataclass
class _Call:
    """One call of a block, as a function of primals and tangents.

    Args:
        forward: The block's own forward.
        spec: Structure of its arguments.
        leaves: Arguments, flat; the moving ones are replaced by primal and tangent.
        moving: Places of tensors that carry derivatives, and whether each has a tangent.
        random: Random numbers from which the call starts.
        structure: Structure of the result and its parts that are not tensors.
        has_tangent: For every tensor of the result, whether it has a tangent.
    """

    forward: Callable[..., Any]
    spec: Any
    leaves: list[Any]
    moving: list[tuple[int, bool]]
    random: RandomState
    structure: tuple[Any, list[Any]] | None = None
    has_tangent: list[bool] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Calls the block; returns primals and tangents of its result."""
        leaves, queue = list(self.leaves), list(tensors)
        for place, has_tangent in self.moving:
            primal = queue.pop(0)
            leaves[place] = forward_ad.make_dual(primal, queue.pop(0)) if has_tangent else primal
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        found, spec = pytree.tree_flatten(self.forward(*args, **kwargs))
        self.structure, self.has_tangent = (spec, [None] * len(found)), []
        results: list[Tensor] = []
        for place, leaf in enumerate(found):
            if not isinstance(leaf, Tensor):
                self.structure[1][place] = leaf
                continue
            primal, tangent = forward_ad.unpack_dual(leaf)
            self.has_tangent.append(tangent is not None)
            results += [primal] if tangent is None else [primal, tangent]
        return results

    def rebuilt(self, tensors: Sequence[Tensor]) -> Any:
        """Puts primals and tangents of the result together again."""
        assert self.structure is not None
        spec, others = self.structure
        queue, marks = list(tensors), list(self.has_tangent)
        leaves = []
        for other in others:
            if other is not None or not marks:
                leaves.append(other)
                continue
            primal = queue.pop(0)
            leaves.append(forward_ad.make_dual(primal, queue.pop(0)) if marks.pop(0) else primal)
        return pytree.tree_unflatten(leaves, spec)


class _Recomputed(torch.autograd.Function):
    """The node of one call: (primals, tangents, parameters) -> (primals, tangents)."""

    @staticmethod
    def forward(ctx: Any, call: _Call, num_moving: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call, ctx.num_moving = call, num_moving
        ctx.save_for_backward(*tensors)
        outputs, call.outputs = call.outputs, []
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        call: _Call = ctx.call
        saved = ctx.saved_tensors
        inputs = [tensor.detach().requires_grad_() for tensor in saved[: ctx.num_moving]]
        sources = [*inputs, *saved[ctx.num_moving :]]
        with kept_random_state(call.random.device), torch.enable_grad(), SplitDuals(), Composites():
            call.random.restore()
            with forward_ad._set_fwd_grad_enabled(True):
                outputs = call.run(inputs)
            pairs = [
                (output, gradient)
                for output, gradient in zip(outputs, grad_outputs, strict=True)
                if gradient is not None and output.requires_grad
            ]
            found = torch.autograd.grad(
                [output for output, _ in pairs],
                sources,
                [gradient for _, gradient in pairs],
                allow_unused=True,
            )
        return None, None, *found


def _wrapped(block: nn.Module) -> Callable[..., Any]:
    original = block.forward
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]

    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        moving: list[tuple[int, bool]] = []
        tensors: list[Tensor] = []
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                primal, tangent = forward_ad.unpack_dual(leaf)
                if tangent is not None or primal.requires_grad:
                    moving.append((place, tangent is not None))
                    tensors += [primal] if tangent is None else [primal, tangent]
                    leaves[place] = None
        device = parameters[0].device if parameters else torch.device("cpu")
        call = _Call(original, spec, leaves, moving, RandomState.capture(device))
        with torch.no_grad():
            call.outputs = [output.detach() for output in call.run(tensors)]
        return call.rebuilt(_Recomputed.apply(call, len(tensors), *tensors, *parameters))

    return forward

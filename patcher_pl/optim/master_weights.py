"""Weights in half precision that are trained by way of copies in float32, as mixed precision does.

A step of 1e-5 is less than half the distance between two neighboring bfloat16 numbers at 0.02, where
most weights of a language model lie: added to the weights themselves it is lost, every time. The
moments of Adam freeze in the same way. In float32 the steps add up until they show.

Micikevicius et al., 2018, https://arxiv.org/abs/1710.03740, section 3.1.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from patcher_pl.types import HALF_PRECISION

Build = Callable[[list[Tensor]], torch.optim.Optimizer]

_without_copies = ContextVar("_without_copies", default=False)


@contextmanager
def without_copies() -> Iterator[None]:
    """Inside, weights in half precision stand for whole ones that are kept elsewhere, as FSDP does."""
    token = _without_copies.set(True)
    try:
        yield
    finally:
        _without_copies.reset(token)


class MasterWeights:
    """What is trained in the place of some weights: float32 copies of those in half precision.

    Weights in float32 or float64 are their own masters. Where somebody else has changed a weight
    since, the copy follows it.

    Args:
        weights: Plain tensors, whole or this process's parts.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = list(weights)
        self.tensors = [_wide(weight) for weight in self.weights]
        self._pairs = [
            (weight, master)
            for weight, master in zip(self.weights, self.tensors, strict=True)
            if weight is not master
        ]

    @property
    def copies(self) -> list[Tensor]:
        """Those that are not the weights themselves."""
        return [master for _, master in self._pairs]

    @torch.no_grad()
    def follow(self) -> None:
        """Takes over the weights that are not the rounded copies any more."""
        for weight, master in self._pairs:
            changed = weight != master.to(weight.dtype)
            master.copy_(torch.where(changed, weight.to(master.dtype), master))

    @torch.no_grad()
    def write_back(self) -> None:
        """Rounds the copies into the weights."""
        for weight, master in self._pairs:
            weight.copy_(master)

    def gradients(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the weights in the format of the copies."""
        return [
            None if gradient is None else gradient.to(master.dtype)
            for gradient, master in zip(gradients, self.tensors, strict=True)
        ]


class MasterWeightOptimizer(torch.optim.Optimizer):
    """An optimizer that trains weights by way of their `MasterWeights`, and saves those.

    To a schedule, a logger and Lightning it is the optimizer within, whose state and groups it shows.

    Args:
        masters: What is trained; the weights hold the gradients.
        build: Makes the optimizer within.
    """

    def __init__(self, masters: MasterWeights, build: Build) -> None:
        self._masters = masters
        self._inner = build(self._masters.tensors)
        super().__init__(self._masters.tensors, dict(self._inner.defaults))
        self._show_inner()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Takes one step with the gradients that the weights hold."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        masters = self._masters
        masters.follow()
        pairs = list(zip(masters.weights, masters.tensors, strict=True))
        for weight, master in pairs:
            if weight is not master:
                master.grad = None if weight.grad is None else weight.grad.to(master.dtype)
        self._inner.step()
        for weight, master in pairs:
            if weight is not master:
                master.grad = None
        masters.write_back()
        return loss

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer that steps the copies."""
        return self._inner

    @property
    def copies(self) -> list[Tensor]:
        """What is kept in float32 beside the weights."""
        return self._masters.copies

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Empties the gradients of the weights."""
        for weight in self._masters.weights:
            if set_to_none:
                weight.grad = None
            elif weight.grad is not None:
                weight.grad.detach_().zero_()

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer within, and the copies."""
        masters = [
            None if master is weight else master
            for weight, master in zip(self._masters.weights, self._masters.tensors, strict=True)
        ]
        return {**self._inner.state_dict(), "master_weights": masters}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from `state_dict`; one of an optimizer without copies starts them at the weights."""
        state = dict(state_dict)
        saved = state.pop("master_weights", None) or [None] * len(self._masters.tensors)
        self._inner.load_state_dict(state)
        self._show_inner()
        for master, value in zip(self._masters.tensors, saved, strict=True):
            if value is not None:
                master.copy_(value)
        self._masters.follow()

    def _show_inner(self) -> None:
        self.param_groups, self.state = self._inner.param_groups, self._inner.state


def trained_in_float32(masters: MasterWeights, build: Build) -> torch.optim.Optimizer:
    """Returns what `build` makes of the weights, or of copies in float32 where they are in less."""
    return MasterWeightOptimizer(masters, build) if masters.copies else build(masters.weights)


def _wide(weight: Tensor) -> Tensor:
    if weight.dtype not in HALF_PRECISION or _without_copies.get():
        return weight
    return weight.detach().to(torch.float32).requires_grad_(weight.requires_grad)

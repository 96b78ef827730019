"""Tells the tracker what the tensors of a run are for, without a change to the code that runs."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from patcher_pl.attackers import Attacker
from patcher_pl.hypergradients import FirstOrder, Hypergradient
from patcher_pl.hypergradients.trajectories.shelf import Shelf
from patcher_pl.models import Weights
from patcher_pl.optim import DifferentiableOptimizer
from patcher_pl.planning.parts import ATTACK, HYPERGRADIENT, Part
from patcher_pl.planning.tracker import Tracker

# Where tensors of a part come into being.
_SITES = (
    (Weights, "snapshot", Part.SAVED_WEIGHTS),
    (Weights, "_shift_space", Part.SAVED_WEIGHTS),
    (Weights, "difference", Part.ATTACK_VECTOR),
    (DifferentiableOptimizer, "init", Part.ATTACKER_OPTIMIZER),
    (Shelf, "put", Part.TRAJECTORY),
)


@contextmanager
def instrumented(
    tracker: Tracker,
    attacker: Attacker | None,
    hypergradient: Hypergradient | None,
    multi_tensor: bool,
) -> Iterator[None]:
    """Names parts and phases of what runs within the block.

    Args:
        tracker: Is told.
        attacker: The simulated attacker; its attacks are a phase.
        hypergradient: The estimator; its estimates are a phase.
        multi_tensor: Whether torch's optimizers update all parameters at once, as they do on a GPU
            unless told otherwise; intermediate results are then as large as the weights.
    """
    with ExitStack() as stack:
        for owner, method, part in _SITES:
            stack.enter_context(_within(owner, method, lambda p=part: tracker.allocating(p)))
        if attacker is not None:
            attack = _within(type(attacker), "attack", lambda: tracker.entering(ATTACK))
            stack.enter_context(attack)
        if hypergradient is not None and not isinstance(hypergradient, FirstOrder):
            kind = type(hypergradient)
            stack.enter_context(_within(kind, "estimate", lambda: tracker.entering(HYPERGRADIENT)))
        for handle in _watch_optimizers(tracker, multi_tensor):
            stack.callback(handle.remove)
        yield


def watch_weights(tracker: Tracker, model: nn.Module) -> None:
    """Names the parameters of a model, its buffers, and gradients as they come."""
    tracker.label_weights([*model.parameters(), *model.buffers()])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad: tracker.label([grad], Part.GRADIENTS))
            parameter.register_post_accumulate_grad_hook(
                lambda owner: tracker.label([owner.grad], Part.GRADIENTS)  # type: ignore[list-item]
            )


@contextmanager
def _within(
    owner: type, method: str, context: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """Lets every call of a method run inside a context, for the length of the block."""
    original = getattr(owner, method)
    own = owner.__dict__.get(method)

    @wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with context():
            return original(*args, **kwargs)

    setattr(owner, method, wrapped)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, method)
        else:
            setattr(owner, method, own)


def _watch_optimizers(tracker: Tracker, multi_tensor: bool) -> list[Any]:
    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            if multi_tensor and group.get("foreach", 0) is None and not group.get("fused"):
                group["foreach"] = True

    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        part = Part.ATTACKER_OPTIMIZER if tracker.phase == ATTACK else Part.DEFENDER_OPTIMIZER
        for state in optimizer.state.values():
            tracker.label([t for t in state.values() if isinstance(t, torch.Tensor)], part)

    return [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]

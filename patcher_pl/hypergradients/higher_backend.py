"""The unrolled attack by `higher`, as a cross-check that shares little code with the rest.

`higher` 0.2.1 knows no AdamW, so this file gives it one, written as its own optimizers are; its SGD is
its own. Clipping goes through its gradient callback.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import higher
import torch
from torch import Tensor, nn

from patcher_pl.attackers.inner_problem import InnerProblem
from patcher_pl.hypergradients.base import HypergradientError, OuterObjective
from patcher_pl.hypergradients.composites import twice_differentiable_attention
from patcher_pl.models.shards import Shards
from patcher_pl.optim import SGD, AdamW, Optimizer
from patcher_pl.types import move_batch


def unroll_with_higher(
    model: nn.Module,
    shards: Shards,
    inner: InnerProblem,
    outer_loss: OuterObjective,
    before_step: Callable[[], None],
) -> tuple[list[Tensor], Tensor]:
    """Returns the attacked parameters and the outer loss at them, with their graphs.

    Raises:
        HypergradientError: If the optimizer is neither SGD nor AdamW.
    """
    update, parameters, device = inner.update, shards.parameters, shards.device
    every = list(model.parameters())
    places = {id(parameter): place for place, parameter in enumerate(every)}

    def clipped(gradients: list[Tensor | None]) -> list[Tensor | None]:
        # `higher` hands out placeholders for what is frozen.
        own = [gradients[places[id(parameter)]] for parameter in parameters]
        own = shards.averaged_with_graph(own)
        own = own if clip is None else clip.applied(own)
        result: list[Tensor | None] = [None] * len(gradients)
        for parameter, one in zip(parameters, own, strict=True):
            result[places[id(parameter)]] = one
        return result

    clip = update.clip
    with _sliceable_module_lists():
        functional = higher.monkeypatch(model, copy_initial_weights=False)
        # `higher` reads settings off a torch optimizer; this one never steps.
        stepper = _torch_optimizer(update.optimizer, parameters)
        differentiable = higher.get_diff_optim(
            stepper, every, fmodel=functional, grad_callback=clipped
        )
        for step, recorded in enumerate(inner.batches):
            before_step()
            batch = move_batch(recorded, device)
            with twice_differentiable_attention():
                loss = inner.loss_function(functional, batch)
            differentiable.step(loss, override={"lr": [update.lr(step)]})
        with twice_differentiable_attention():
            loss = outer_loss(functional)
    attacked = list(functional.parameters())
    return [attacked[places[id(parameter)]] for parameter in parameters], loss


@contextmanager
def _sliceable_module_lists() -> Iterator[None]:
    """Makes slices of patched module lists plain lists, for the length of the block.

    `ModuleList.__getitem__` builds a slice with the class of the list, which `higher` has replaced
    by one with another constructor; Hugging Face models iterate over `self.layers[:n]`.
    """
    original = nn.ModuleList.__getitem__

    def getitem(self: nn.ModuleList, index: Any) -> Any:
        if isinstance(index, slice) and type(self) is not nn.ModuleList:
            return list(self)[index]
        return original(self, index)

    nn.ModuleList.__getitem__ = getitem  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.ModuleList.__getitem__ = original  # type: ignore[method-assign]


class _AdamW(torch.optim.Optimizer):
    """Carries the settings of AdamW to `higher`; never steps itself."""

    def __init__(self, parameters: list[Any], settings: AdamW) -> None:
        defaults = {
            "lr": settings.lr,
            "betas": settings.betas,
            "eps": settings.eps,
            "weight_decay": settings.weight_decay,
            "eps_root": settings.eps_root or 0.0,
        }
        super().__init__(parameters, defaults)


class _DifferentiableAdamW(higher.optim.DifferentiableOptimizer):
    """AdamW as `higher` writes its optimizers."""

    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        for place, (group, gradients) in enumerate(
            zip(self.param_groups, grouped_grads, strict=True)
        ):
            beta1, beta2 = group["betas"]
            for index, (p, g) in enumerate(zip(group["params"], gradients, strict=True)):
                if g is None:
                    continue
                state = self.state[place][index]
                state["step"] = state.get("step", 0) + 1
                state["m"] = m = beta1 * state.get("m", 0.0) + (1 - beta1) * g
                state["v"] = v = beta2 * state.get("v", 0.0) + (1 - beta2) * g.square()
                under_root = v / (1 - beta2 ** state["step"]) + group["eps_root"]
                nowhere = under_root == 0
                root = under_root.masked_fill(nowhere, 1.0).sqrt().masked_fill(nowhere, 0.0)
                m_hat = m / (1 - beta1 ** state["step"])
                shrunk = p - group["lr"] * group["weight_decay"] * p
                group["params"][index] = shrunk - group["lr"] * m_hat / (root + group["eps"])


@cache
def _register() -> None:
    higher.register_optim(_AdamW, _DifferentiableAdamW)  # type: ignore[arg-type]


def _torch_optimizer(settings: Optimizer, parameters: list[Any]) -> torch.optim.Optimizer:
    if isinstance(settings, SGD):
        return settings.build(parameters)
    if isinstance(settings, AdamW):
        _register()
        return _AdamW(parameters, settings)
    raise HypergradientError(
        f"Unrolled.backend: higher knows SGD and AdamW only, got {type(settings).__name__}. "
        "Use backend torch."
    )

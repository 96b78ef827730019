"""A torch optimizer that steps by one of the functional updates of this package."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from patcher_pl.optim.base import Optimizer, OptimizerState


class TorchAdapter(torch.optim.Optimizer):
    """Steps as `settings` say, for updates that torch does not have; schedules work as usual.

    Args:
        parameters: What is trained, in one group.
        settings: The update and its step size.
    """

    def __init__(self, parameters: Iterable[Tensor], settings: "Optimizer") -> None:
        super().__init__(parameters, {"lr": settings.lr})
        self._settings = settings
        self._states: list[OptimizerState] = [
            settings.init(group["params"]) for group in self.param_groups
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Takes one step with the gradients that the parameters hold."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, state in zip(self.param_groups, self._states, strict=True):
            gradients = [parameter.grad for parameter in group["params"]]
            self._settings.step_(group["params"], gradients, state, group["lr"])
        return loss

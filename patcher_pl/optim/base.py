"""The interface of an attacker's optimizer."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor


class Optimizer(ABC):
    """Settings of an optimizer; holds no state of its own."""

    lr: float

    @abstractmethod
    def build(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Returns a fresh torch optimizer over `parameters`."""

    def _require(self, holds: bool, field: str, rule: str, remedy: str) -> None:
        if not holds:
            name, value = type(self).__name__, getattr(self, field)
            raise ValueError(f"{name}.{field} must be {rule}, got {value}. {remedy}")

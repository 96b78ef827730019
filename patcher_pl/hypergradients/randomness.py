"""Replay of random numbers, so that dropout falls the same way on the way back."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """State of the generators that a forward pass on `device` may draw from."""

    device: torch.device
    cpu: Tensor
    accelerator: Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> "RandomState":
        """Returns the current state."""
        module = _accelerator(device)
        state = None if module is None else module.get_rng_state(device)
        return cls(device, torch.get_rng_state(), state)

    def restore(self) -> None:
        """Goes back to this state."""
        torch.set_rng_state(self.cpu)
        module = _accelerator(self.device)
        if module is not None:
            module.set_rng_state(self.accelerator, self.device)


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Lets the block draw or restore as it likes; afterwards the generators are as before."""
    state = RandomState.capture(device)
    try:
        yield
    finally:
        state.restore()


def _accelerator(device: torch.device) -> Any:
    return None if device.type == "cpu" else torch.get_device_module(device)

"""Seeds, and the state of random generators: put back, carried to another process, checkpointed."""

import base64
import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Returns a seed in [0, 2^63) that depends on `seed` and on what it is used for.

    The same on every machine and Python version; neighboring seeds and purposes are unrelated.
    """
    # Not Python's hash, which differs from process to process.
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class RandomState:
    """State of torch's generators that a computation on `device` may draw from."""

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
        if module is not None and self.accelerator is not None:
            module.set_rng_state(self.accelerator, self.device)

    def as_text(self) -> dict[str, str]:
        """The state for a message to another process."""
        states = {"cpu": self.cpu, "accelerator": self.accelerator}
        return {
            name: base64.b64encode(state.cpu().numpy().tobytes()).decode()
            for name, state in states.items()
            if state is not None
        }

    @classmethod
    def of_text(cls, text: dict[str, str], device: torch.device) -> "RandomState":
        """A state that was sent; that of a device only where one of its kind was sent."""
        states = {
            name: torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8)
            for name, state in text.items()
        }
        return cls(device, states["cpu"], states.get("accelerator"))


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Lets the block draw or restore as it likes; afterwards torch's generators are as before."""
    state = RandomState.capture(device)
    try:
        yield
    finally:
        state.restore()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's generators (CPU and `device`) inside the block and restores them after it."""
    with kept_random_state(device):
        torch.default_generator.manual_seed(seed)
        module = _accelerator(device)
        if module is not None:
            module.manual_seed(seed)
        yield


@contextmanager
def keeping_generators() -> Iterator[None]:
    """Puts the generators of Python and numpy back after the block; `seeded` does torch's."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def collect_generators(device: torch.device, num_processes: int) -> list[dict[str, Tensor]]:
    """Returns the states of torch's, Python's and numpy's generators, for a checkpoint.

    Returns:
        One state per process of the run, in the order of their ranks.
    """
    torchs = RandomState.capture(device)
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    own = {
        "cpu": torchs.cpu,
        # Words of 32 bits are exact in float64, and the cached numbers are float64 themselves.
        "python": torch.tensor(
            [version, *words, float("nan") if gauss is None else gauss], dtype=torch.float64
        ),
        "numpy": torch.tensor([*keys, position, has_gauss, cached], dtype=torch.float64),
    }
    if torchs.accelerator is not None:
        own["accelerator"] = torchs.accelerator
    if num_processes == 1:
        return [own]
    states: list[Any] = [None] * num_processes
    torch.distributed.all_gather_object(states, own)
    return states


def restore_generators(state: dict[str, Tensor], device: torch.device) -> None:
    """Goes back to one of the collected states."""
    # Loading a checkpoint may have put them on a device, where generators do not take them.
    accelerator = state.get("accelerator")
    accelerator = None if accelerator is None else accelerator.cpu()
    RandomState(device, state["cpu"].cpu(), accelerator).restore()
    version, *words, gauss = state["python"].tolist()
    random.setstate((int(version), tuple(map(int, words)), None if np.isnan(gauss) else gauss))
    *keys, position, has_gauss, cached = state["numpy"].tolist()
    words = np.array(keys, dtype=np.uint32)
    np.random.set_state(("MT19937", words, int(position), int(has_gauss), cached))


def _accelerator(device: torch.device) -> Any:
    return None if device.type == "cpu" else torch.get_device_module(device)

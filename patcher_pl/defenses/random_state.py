"""Generators of random numbers of every process, as tensors that go into a checkpoint."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]


def collect(device: torch.device, num_processes: int) -> list[State]:
    """Returns the generator states of all processes of a run, in the order of their ranks."""
    own = _capture(device)
    if num_processes == 1:
        return [own]
    states: list[Any] = [None] * num_processes
    torch.distributed.all_gather_object(states, own)
    return states


def restore(state: State, device: torch.device) -> None:
    """Goes back to a collected state."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type != "cpu" and "accelerator" in state:
        module = torch.get_device_module(device.type)
        module.set_rng_state(state["accelerator"].cpu(), device)
    version, *words, gauss = state["python"].tolist()
    random.setstate((int(version), tuple(map(int, words)), None if np.isnan(gauss) else gauss))
    *keys, position, has_gauss, cached = state["numpy"].tolist()
    words = np.array(keys, dtype=np.uint32)
    np.random.set_state(("MT19937", words, int(position), int(has_gauss), cached))


def _capture(device: torch.device) -> State:
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "cpu": torch.get_rng_state(),
        # Words of 32 bits are exact in float64, and the cached numbers are float64 themselves.
        "python": torch.tensor(
            [version, *words, float("nan") if gauss is None else gauss], dtype=torch.float64
        ),
        "numpy": torch.tensor([*keys, position, has_gauss, cached], dtype=torch.float64),
    }
    if device.type != "cpu":
        state["accelerator"] = torch.get_device_module(device.type).get_rng_state(device)
    return state

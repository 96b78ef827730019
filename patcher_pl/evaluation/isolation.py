"""Looking at a model without leaving a trace: modes and random generators are put back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import nn


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's generators (CPU and `device`) inside the block and restores them after it."""
    kind = device.type if device.type != "cpu" else "cuda"
    devices = [] if device.type == "cpu" else [_index(device)]
    with torch.random.fork_rng(devices=devices, device_type=kind):
        torch.default_generator.manual_seed(seed)
        if device.type != "cpu":
            torch.get_device_module(device.type).manual_seed(seed)
        yield


@contextmanager
def keeping_generators() -> Iterator[None]:
    """Puts the generators of Python and numpy back after the block; `seeded` does torch's."""
    of_python, of_numpy = random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(of_python)
        numpy.random.set_state(of_numpy)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every module into evaluation mode inside the block; each gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _index(device: torch.device) -> int:
    if device.index is not None:
        return device.index
    return torch.get_device_module(device.type).current_device()

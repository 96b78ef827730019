"""Random generators whose state goes from one process to another."""

import base64

import torch
from torch import Tensor


def saved_random_state(device: torch.device) -> dict[str, str]:
    """Returns the states of the generators of the CPU and of `device`, as text."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return {name: base64.b64encode(_bytes(state)).decode() for name, state in states.items()}


def restore_random_state(saved: dict[str, str], device: torch.device) -> None:
    """Sets the generators to saved states; the device's only where one of its kind was saved."""
    states = {name: _tensor(base64.b64decode(text)) for name, text in saved.items()}
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and "device" in states:
        torch.get_device_module(device).set_rng_state(states["device"], device)


def _bytes(state: Tensor) -> bytes:
    return state.cpu().numpy().tobytes()


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)

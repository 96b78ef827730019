"""Which device a command runs on."""

from typing import TYPE_CHECKING

from patcher_pl.errors import ConfigError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> "torch.device":
    """The device of that name; `auto` is a GPU where there is one.

    Raises:
        ConfigError: If it cannot be used.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {name!r} cannot be used ({error}). Try `cpu`.") from error
    return device

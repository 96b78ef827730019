"""The machine that a command runs on: its device, its CPU threads, and the memory that was used."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def cpu_threads(num_threads: int | None) -> Iterator[None]:
    """Limits torch's CPU threads inside the block; None leaves them as they are.

    Models of well under a million parameters run best on one thread: more wait for each other, by
    orders of magnitude where other processes use the same cores. Sums then also come out the same
    however many cores there are.

    Raises:
        ConfigError: If `num_threads` is below 1.
    """
    if num_threads is None:
        yield
        return
    if num_threads < 1:
        raise ConfigError(f"num_threads must be >= 1 or null, got {num_threads}.")
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_memory_gib(device: "torch.device") -> float:
    """Peak memory of this process so far, in GiB.

    Args:
        device: On a GPU, what torch's allocator held there at most; on a CPU, the resident set.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20

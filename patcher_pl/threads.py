"""How many CPU threads torch may use."""

from collections.abc import Iterator
from contextlib import contextmanager

from patcher_pl.errors import ConfigError


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

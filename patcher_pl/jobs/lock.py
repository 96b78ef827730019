"""Keeps a directory for one process: what another one would write into it is refused, naming the first."""

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import SoftFileLease, Timeout

from patcher_pl.errors import ConfigError

LOCK = ".lock"
# The owner says that often that it lives, and is taken for dead after that long without a sign. In
# between lies the minute for which NFS may show another machine old times of change.
_RENEWED_EVERY_S, _LEASE_S = 20.0, 120.0
# Enough to see that an owner on this machine is dead.
_PATIENCE_S = 2.0

logger = logging.getLogger(__name__)


class InUseError(ConfigError):
    """A directory that another process is working in."""


@contextmanager
def held(directory: Path, *, is_part: bool = False) -> Iterator[None]:
    """Keeps `directory`, which is created when missing, for this process until the block ends.

    One that was created here and is empty at the end is removed again.

    The lock is a file that names process and machine, created exclusively, which holds on every file
    system that machines share (NFS, Lustre, ...); `flock` does not on some of them. A lock that a
    process of this machine left when it died is taken over at once, one from another machine after
    two minutes without a sign of life, for which a job that SLURM has put back into its queue waits,
    and so does part of a command's work: an engine that lost a node begins it elsewhere.

    Args:
        directory: To be kept.
        is_part: Whether a command that holds a folder above it has this work done.

    Raises:
        InUseError: If another process has it.
        OSError: If the lock cannot be written.
    """
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    lock = directory / LOCK
    lease = SoftFileLease(lock, lease_duration=_LEASE_S, heartbeat_interval=_RENEWED_EVERY_S)
    try:
        lease.acquire(timeout=_PATIENCE_S)
    except Timeout:
        _outlast(lease, lock, is_part=is_part)
    try:
        yield
    finally:
        lease.release()
        if is_new:
            with suppress(OSError):  # It holds something.
                directory.rmdir()


def _outlast(lease: SoftFileLease, lock: Path, *, is_part: bool) -> None:
    """Takes the lock of an owner elsewhere that shows no sign of life any more."""
    owner = lease.owner
    process = "another process" if owner is None else f"process {owner.pid} on {owner.hostname}"
    refusal = InUseError(
        f"--run_dir {lock.parent} is in use by {process}. Wait until that ends, end it, or give "
        f"another directory. ({lock} is its lock.)"
    )
    is_here = owner is not None and owner.hostname == socket.gethostname()
    begins_again = is_part or "SLURM_RESTART_COUNT" in os.environ
    may_be_dead = begins_again or _silence_s(lock) >= _LEASE_S
    if is_here or not may_be_dead:
        raise refusal
    logger.warning(
        "%s: %s holds it; taking over if it shows no sign of life for %.0f s.",
        *(lock.parent, process, _LEASE_S),
    )
    try:
        lease.acquire(timeout=_LEASE_S + _PATIENCE_S)
    except Timeout:
        raise refusal from None


def _silence_s(lock: Path) -> float:
    """Seconds since the owner has renewed its lock, by the clock of the file system."""
    with tempfile.TemporaryFile(dir=lock.parent) as now:
        try:
            return os.fstat(now.fileno()).st_mtime - lock.stat().st_mtime
        except FileNotFoundError:
            return float("inf")  # Released just now.

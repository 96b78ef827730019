"""Attacks on a model that several processes hold together."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import distributed

from patcher_pl.errors import PatcherError, RunInterrupted
from patcher_pl.jobs import Engine, Job
from patcher_pl.jobs.signals import stoppable
from patcher_pl.launcher import num_processes_here
from patcher_pl.machine import cpu_threads
from patcher_pl.progress import progress_bar
from patcher_pl.redteam.job import AttackJob, Bench
from patcher_pl.reports.environment import usable_cpus

logger = logging.getLogger(__name__)


class PeerError(PatcherError):
    """One of the processes failed in the middle of what all do together."""


@dataclass(frozen=True, kw_only=True)
class Together(Engine):
    """Runs attacks one after the other, each on all processes of `torch.distributed`.

    The first process uses it; it alone writes files, asks judges and decides what comes next. The
    others `follow`.
    """

    def run(self, jobs: Sequence[Job], device: str, label: str) -> None:
        """See `Engine.run`.

        An attack that fails on one process alone leaves its file and ends the run, since the others
        wait for that process; the same command goes on.
        """
        with stoppable(label), progress_bar(label, len(jobs)) as advance:
            for job in cast(Sequence[AttackJob], jobs):
                lead(job, device)
                advance()

    def num_threads(self, num_jobs: int) -> int:
        return max(1, usable_cpus() // num_processes_here())

    def at_once(self, num_jobs: int) -> int:
        return 1


def lead(job: AttackJob, device: str) -> None:
    """Attacks with those who `follow`, and leaves the outcome; on the first process.

    Raises:
        PatcherError: See `Job.perform`; a `PeerError` where one process alone failed.
    """
    if job.needs_model:
        _send(job.on(Bench()))
        _require_ready(job)
        _guarded(job, partial(job.perform, device))
    else:
        job.attempt(device)


def follow(bench: Bench, device: str) -> None:
    """Takes part in attacks until the first process has no more; on all processes but that one."""
    while (job := _receive()) is not None:
        own = job.on(bench)
        _require_ready(own)
        try:
            with cpu_threads(own.num_threads), _quiet():
                _guarded(own, partial(own.attacked, device))
        except PeerError:
            raise
        except PatcherError as error:
            # Wrong for all: the first one tells it, and decides whether there is more to do.
            logger.debug("%s: %s", own.path.name, error)


@contextmanager
def leading() -> Iterator[None]:
    """Lets the others leave `follow` at the end of the block, if they are there."""
    try:
        yield
    except (PeerError, RunInterrupted, KeyboardInterrupt):
        raise  # They are in the middle of an attack, and end with this process.
    except BaseException:
        _send(None)
        raise
    _send(None)


def _require_ready(job: AttackJob) -> None:
    """Sees to it that no process lacks a file that the others have: they would wait for it.

    Raises:
        PeerError: On all, if one does.
    """
    reason = None
    try:
        job.require_inputs()
    except (PatcherError, OSError) as error:
        reason = str(error)
    reasons: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(reasons, reason)
    # What all lack is an error like that of one process, met in the attack.
    if None in reasons and (lacking := [rank for rank, one in enumerate(reasons) if one]):
        raise PeerError(
            f"Process {lacking[0]} of {len(reasons)} cannot go on: {reasons[lacking[0]]}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Lets this process tell of what goes wrong alone: the first one tells how far the attack is."""
    package = logging.getLogger("patcher_pl")
    level = package.level
    package.setLevel(logging.WARNING)
    try:
        yield
    finally:
        package.setLevel(level)


def _guarded(job: AttackJob, function: Callable[[], Any]) -> None:
    written = job.changed_at
    try:
        function()
    except PatcherError:
        raise
    except Exception as error:
        rank = distributed.get_rank()
        logger.warning("%s failed on process %d", job.path, rank, exc_info=error)
        # Once one has failed, the others lose their connection to it: what it wrote says why.
        if job.changed_at == written:
            job.fail(f"{type(error).__name__}: {error}")
        raise PeerError(
            f"{job.path.name} failed on process {rank} of {distributed.get_world_size()} "
            f"({type(error).__name__}: {error}). The others cannot go on without it; what was done "
            "before is kept. Start the same command again, without this attack if it fails again."
        ) from error


def _send(job: AttackJob | None) -> None:
    distributed.broadcast_object_list([job], src=0)


def _receive() -> AttackJob | None:
    message: list[Any] = [None]
    distributed.broadcast_object_list(message, src=0)
    return message[0]

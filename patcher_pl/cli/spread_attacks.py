"""Attacks of which each is made by several processes that an engine has started for it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from patcher_pl.cli.launched import launched
from patcher_pl.jobs import Engine, Job
from patcher_pl.redteam.job import AttackJob, Bench
from patcher_pl.redteam.together import PeerError, follow, lead, leading
from patcher_pl.reports.results import Curve


@dataclass(frozen=True, kw_only=True)
class SpreadAttack(Job[Curve]):
    """An attack on a model that the processes of its job hold together, spread with FSDP2.

    Args:
        attack: The attack; its file is this job's.
        before: When that had last changed before this was planned, see `Job.changed_at`.
    """

    attack: AttackJob
    before: int | None

    key: ClassVar[str] = AttackJob.key
    is_shareable: ClassVar[bool] = True

    @property
    def is_done(self) -> bool:
        """See `AttackJob.is_done`."""
        return self.attack.is_done

    def perform(self, device: str) -> None:
        """See `Job.perform`."""
        self.attack.perform(device)

    def perform_together(self, device: str) -> None:
        """See `Job.perform_together`."""
        try:
            with launched(device) as (mesh, place):
                bench = Bench(mesh=mesh)
                if mesh.get_rank() > 0:
                    follow(bench, place)
                    return
                with leading():
                    lead(self.attack.on(bench), place)
        except PeerError as error:
            self.fail(str(error))  # This attack's alone.
            sys.exit(1)

    def fail(self, reason: str) -> None:
        """See `AttackJob.fail`; the first of the processes that failed has said why."""
        if self.changed_at == self.before:
            self.attack.fail(reason)

    def parse(self, content: Any) -> Curve:
        """See `AttackJob.parse`."""
        return self.attack.parse(content)


@dataclass(frozen=True, kw_only=True)
class Spread(Engine):
    """Has an engine that starts several processes per job make each attack with all of them.

    Args:
        engine: What starts them.
    """

    engine: Engine

    def run(self, jobs: Sequence[Job], device: str, label: str) -> None:
        """See `Engine.run`."""
        attacks = [
            SpreadAttack(path=job.path, digest=job.digest, attack=job, before=job.changed_at)
            for job in cast(Sequence[AttackJob], jobs)
        ]
        self.engine.run(attacks, device, label)

    def num_threads(self, num_jobs: int) -> int:
        """See `Engine.num_threads`."""
        return self.engine.num_threads(num_jobs)

    def at_once(self, num_jobs: int) -> int | None:
        """See `Engine.at_once`."""
        return self.engine.at_once(num_jobs)

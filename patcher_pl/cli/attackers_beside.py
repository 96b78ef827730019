"""Starts the attackers of a run as processes of their own, and ends them with it."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from patcher_pl.attackers import ConcurrentAttacker
from patcher_pl.defenses.attack_source import Concurrent
from patcher_pl.jobs.run_directory import RunDirectory
from patcher_pl.machine import cpu_threads
from patcher_pl.mailbox import Mailbox, Side
from patcher_pl.private_directory import private_directory
from patcher_pl.reports.environment import usable_cpus
from patcher_pl.supervision import Program, Supervisor

if TYPE_CHECKING:
    from patcher_pl.cli.lightning_cli import PatcherCLI


@contextmanager
def attackers_beside(cli: "PatcherCLI", run_directory: RunDirectory) -> Iterator[None]:
    """Keeps the concurrent attackers of a run going inside the block; does nothing without any.

    At its end, however it comes, no process and no private mailbox is left. Logs go to `attackers/`
    below the directory of the run.
    """
    source = cli.model.attack_source
    if not isinstance(source, Concurrent) or not source.settings.launch:
        yield
        return
    settings, rehearsal = source.settings, bool(cli.options.trainer.fast_dev_run)
    with ExitStack() as stack:
        shared = None if rehearsal else settings.mailbox
        root = stack.enter_context(private_directory()) if shared is None else shared
        config, logs = run_directory.config, run_directory.attackers
        if rehearsal:  # Which leaves nothing in the directory of the run.
            config, logs = root / "config.yaml", root / "logs"
            cli.save_config(config)
        num_threads = _shared_threads(cli, settings)
        stack.enter_context(cpu_threads(num_threads))
        mailbox = Mailbox(root, len(settings.population))
        jobs = [
            _job(member, mailbox, config, logs / f"{member}.log", num_threads)
            for member in range(len(settings.population))
        ]
        supervisor = stack.enter_context(Supervisor(jobs, settings.max_failures))
        source.connect(root, supervisor)
        yield


def _shared_threads(cli: "PatcherCLI", settings: ConcurrentAttacker) -> int | None:
    """CPU threads of every process; None leaves them as they are."""
    given = cli.options.num_threads
    if given is not None or cli.trainer.strategy.root_device.type != "cpu":
        return given
    if settings.lock_step:  # They take turns. Sums depend on the number of threads.
        return torch.get_num_threads()
    return max(1, usable_cpus() // (1 + len(settings.population)))


def _job(
    member: int, mailbox: Mailbox, config: Path, log: Path, num_threads: int | None
) -> Program:
    command = [sys.executable, "-m", "patcher_pl", "attacker", "--supervised"]
    command += ["--config", str(config), "--mailbox", str(mailbox.root), "--member", str(member)]
    environment = {}
    if num_threads is not None:
        command += ["--num_threads", str(num_threads)]
        environment["OMP_NUM_THREADS"] = str(num_threads)
    side: Side = mailbox.attackers[member]
    return Program(
        name=f"attacker {member}",
        command=command,
        log=log,
        environment=environment,
        num_achieved=lambda: max(side.versions(), default=-1) + 1,
    )

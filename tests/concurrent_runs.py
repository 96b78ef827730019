"""Concurrent attackers in threads of this process: as in processes of their own, in less time."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from patcher_pl.attackers import Attacker, ConcurrentAttacker, Member
from patcher_pl.attackers.service import AttackService
from patcher_pl.errors import RunInterrupted
from patcher_pl.mailbox import Mailbox
from patcher_pl.models import LanguageModel
from tests.tiny_runs import ATTACKER, Rows


def concurrent(
    mailbox: Path, attackers: Sequence[Attacker] = (ATTACKER,), **options: Any
) -> ConcurrentAttacker:
    """Settings of attackers that somebody else starts."""
    population = [Member(attacker=attacker) for attacker in attackers]
    return ConcurrentAttacker(population=population, mailbox=mailbox, launch=False, **options)


def make_service(
    settings: ConcurrentAttacker,
    path: Path,
    rows: Rows,
    *,
    index: int = 0,
    check: Callable[[], None] = lambda: None,
    lora: Any = None,
    **options: Any,
) -> AttackService:
    """An attacker with a model and data of its own."""
    assert settings.mailbox is not None
    language_model = LanguageModel(path=str(path), lora=lora)
    stream = rows.stream("attack", language_model.load_tokenizer())
    return AttackService(
        settings=settings,
        index=index,
        mailbox=Mailbox(settings.mailbox, len(settings.population)),
        model=language_model.load_model().train(),
        stream=lambda seed, data: stream,
        batch_size=4,
        check=check,
        **options,
    )


@contextmanager
def attackers_at_work(
    settings: ConcurrentAttacker,
    path: Path,
    rows: Rows,
    check: Callable[[], None] = lambda: None,
    **options: Any,
) -> Iterator[None]:
    """Runs every attacker of the population for the length of the block.

    What goes wrong in a thread is raised at the end of the block.
    """
    stopped, errors = threading.Event(), []

    def check_both() -> None:
        if stopped.is_set():
            raise RunInterrupted("the test is over")
        check()

    def serve(service: AttackService) -> None:
        try:
            while service.attack_next():
                pass
        except RunInterrupted:
            pass
        except BaseException as error:
            errors.append(error)

    assert settings.mailbox is not None
    settings.mailbox.mkdir(parents=True, exist_ok=True)
    # Loading draws random numbers of the one generator that all threads share.
    with torch.random.fork_rng():
        services = [
            make_service(settings, path, rows, index=index, check=check_both, **options)
            for index in range(len(settings.population))
        ]
    for service in services:
        _draw_before_publishing(service)
    threads = [threading.Thread(target=serve, args=(service,)) for service in services]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
    assert not errors, errors


def _draw_before_publishing(service: Any) -> None:
    """Spoils the generator that threads share: the defender must take over what is handed to it."""
    publish = service._publish

    def publish_after_drawing(*message: Any) -> None:
        torch.rand(1)
        publish(*message)

    service._publish = publish_after_drawing

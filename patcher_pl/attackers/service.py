"""What an attacker's process does all day: take the newest theta, attack it, publish the outcome."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import torch
from torch import Tensor, nn

from patcher_pl.attackers.base import Attacker, AttackOutcome, DrawnAttack
from patcher_pl.attackers.carry import Carried
from patcher_pl.attackers.concurrent import ConcurrentAttacker
from patcher_pl.data.stream import BatchStream
from patcher_pl.data.variant import AttackData
from patcher_pl.errors import PatcherError
from patcher_pl.mailbox import (
    Attacked,
    Mailbox,
    Snapshot,
    Theta,
    wait_for,
)
from patcher_pl.models.weights import Weights
from patcher_pl.randomness import RandomState, derive_seed

logger = logging.getLogger(__name__)

# Between two looks whether an attack is still wanted, and two notes of what it has taken.
_LOOK_AROUND_S = 1.0


class _Superseded(Exception):  # noqa: N818
    """The defender was restarted or has finished: nobody waits for this attack any more."""


class AttackService:
    """One attacker at its mailbox; remembers nothing that a restart would lose, but carried attacks.

    The outcome of an attack depends on the theta that is attacked and on its number alone, so that
    an attacker which is killed and restarted repeats the attack as it was. One that was to go on where
    an earlier attack ended begins at theta then.

    Args:
        settings: The concurrent attacker.
        index: Which member of the population this is (count from 0).
        mailbox: What it shares with the defender.
        model: Takes the published weights.
        stream: Returns the attacker's batches, given the seed of the run's data and what data.
        batch_size: Conversations per batch of the run's attack data (count).
        check: Called before every attack step and while waiting; may raise to end the service.
        idle_timeout_s: Seconds without anything to attack after which `attack_next` fails; None
            waits for as long as it takes.
    """

    def __init__(
        self,
        *,
        settings: ConcurrentAttacker,
        index: int,
        mailbox: Mailbox,
        model: nn.Module,
        stream: Callable[[int, AttackData], BatchStream],
        batch_size: int,
        check: Callable[[], None],
        idle_timeout_s: float | None = None,
    ) -> None:
        self._settings = settings
        self._index = index
        self._member = settings.population[index]
        self._mailbox = mailbox
        self._side = mailbox.attackers[index]
        self._model = model
        self._weights = Weights(model)
        self._state = shared_state(model)
        self._stream = stream
        self._batch_size = batch_size
        self._carried: dict[str, Carried] = {}
        self._check = check
        self._idle_timeout_s = idle_timeout_s
        self._noted_at_s = time.monotonic()
        self._finished_before = mailbox.finished_life()
        self._side.clean()
        own = self._side.newest()
        self._last = None if own is None else _identity(Attacked.from_info(own.info).theta)
        self._spent = mailbox.read_spent(index)
        # What a process before this one had under way died with it.
        self._spent.lost += self._spent.under_way
        self._spent.under_way = 0
        logger.info("Attacker %d is ready at %s.", index, mailbox.root)

    def attack_next(self) -> bool:
        """Waits for a theta that it has not attacked, attacks it and publishes what came of it.

        Returns:
            Whether to go on; False once the defender has finished.

        Raises:
            PatcherError: If nothing came for `idle_timeout_s`.
        """
        theta = self._next_theta()
        if theta is None:
            return False
        try:
            outcome, message = self._attack(theta)
        except _Superseded:
            logger.info("Nobody waits for attack %d any more; it is called off.", theta.number)
            self._spent.lost += self._spent.under_way
        else:
            self._publish(outcome, message)
            self._spent.finished += self._spent.under_way
            logger.info(
                "Attacked theta of step %d: loss %.4f to %.4f.",
                *(theta.step, outcome.steps[0].loss, outcome.steps[-1].loss),
            )
        self._last = _identity(theta)
        self._spent.under_way = 0
        self._note("busy_s")
        return True

    @property
    def _attacker(self) -> Attacker:
        return self._member.attacker

    def _next_theta(self) -> Theta | None:
        began_s = time.monotonic()

        def look() -> Theta | str | None:
            found = self._mailbox.defender.fetch(self._state, self._is_new)
            if found is not None:
                return Theta.from_info(found.info)
            life = self._mailbox.finished_life()
            return "finished" if life not in (None, self._finished_before) else None

        def between() -> None:
            self._check()
            now_s = time.monotonic()
            if now_s - self._noted_at_s > _LOOK_AROUND_S:
                self._note("idle_s")
            if self._idle_timeout_s is not None and now_s - began_s > self._idle_timeout_s:
                raise PatcherError(
                    f"{self._mailbox.root}: no defender published anything to attack for "
                    f"{self._idle_timeout_s:g} s. Start `fit` with the same mailbox."
                )

        found = wait_for(look, between)
        self._note("idle_s")
        return found if isinstance(found, Theta) else None

    def _is_new(self, snapshot: Snapshot) -> bool:
        return _identity(Theta.from_info(snapshot.info)) != self._last

    def _attack(self, theta: Theta) -> tuple[AttackOutcome, Attacked]:
        device = self._weights.parameters[0].device
        own_seed = theta.seed if self._member.seed is None else self._member.seed
        drawn = self._attacker.draw(own_seed, theta.number)
        start = self._start(drawn, theta.number)
        stream = self._stream(own_seed, drawn.data)
        position = self._attacker.steps_before(own_seed, theta.number)
        stream.load_state_dict({"position": position})
        evaluations = drawn.data.evaluations_per_step(self._batch_size)
        handed_over = self._member.seed is None and theta.random_state is not None
        if handed_over and theta.random_state is not None:
            RandomState.of_text(theta.random_state, device).restore()
        else:
            torch.manual_seed(derive_seed(own_seed, "attack", theta.number))

        def before_step() -> None:
            self._check()
            if time.monotonic() - self._noted_at_s > _LOOK_AROUND_S:
                self._note("busy_s")
                newest = self._mailbox.defender.newest()
                if newest is None or newest.info["life"] != theta.life:
                    raise _Superseded
            self._spent.under_way += evaluations

        outcome = drawn.attacker.attack(
            *(self._model, self._weights, stream.endless(), before_step),
            **({} if start is None else {"start": start}),
        )
        num_steps = outcome.num_steps_from(start)
        if drawn.is_carried:
            self._carried[drawn.kind] = Carried(outcome.vector, num_steps, outcome.moments)
        message = Attacked(
            theta=theta,
            kind="weights" if self._publishes_weights else "vector",
            losses=[step.loss for step in outcome.steps],
            num_tokens=[step.num_tokens for step in outcome.steps],
            num_steps_from_theta=num_steps,
            evaluations_per_step=evaluations,
            random_state=RandomState.capture(device).as_text() if handed_over else None,
        )
        return outcome, message

    def _start(self, drawn: DrawnAttack, number: int) -> Carried | None:
        if drawn.begins_anew:
            return None
        start = self._carried.get(drawn.kind)
        if start is None:
            logger.warning(
                "Attack %d was to go on where an earlier one ended, which this process has not made: "
                "it begins at the defender's weights.",
                number,
            )
        return start

    @property
    def _publishes_weights(self) -> bool:
        return not self._settings.lock_step and self._settings.anchor == "current"

    def _publish(self, outcome: AttackOutcome, message: Attacked) -> None:
        tensors = outcome.vector
        if self._publishes_weights:
            pairs = zip(self._weights.parameters, outcome.vector, strict=True)
            tensors = [parameter.detach() + change for parameter, change in pairs]
        named = dict(zip(self._weights.names, tensors, strict=True))
        self._side.publish(message.theta.version, named, message.to_info())

    def _note(self, kind: Literal["busy_s", "idle_s"]) -> None:
        """Keeps what was done since the last note, and that the time went into it."""
        now_s = time.monotonic()
        setattr(self._spent, kind, getattr(self._spent, kind) + now_s - self._noted_at_s)
        self._noted_at_s = now_s
        # Where the mailbox is gone, the process is about to end; where the disk is full, publishing
        # says so.
        with suppress(OSError):
            self._mailbox.write_spent(self._index, self._spent)


def shared_state(model: nn.Module) -> dict[str, Tensor]:
    """What the defender publishes of its model, adapters and buffers included; not copied."""
    persistent = model.state_dict(keep_vars=True).keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if name in persistent}


def _identity(theta: Theta) -> tuple[str, int]:
    return theta.life, theta.version

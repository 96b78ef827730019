"""The defender's end of the mailbox: publishes theta, picks up attack vectors, waits where it must."""

import logging
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patcher_pl.attackers import ConcurrentAttacker, combined
from patcher_pl.attackers.service import shared_state
from patcher_pl.defenses.slots import Arrival, Clocks, Slot
from patcher_pl.errors import ConfigError
from patcher_pl.mailbox import (
    Attacked,
    Mailbox,
    Snapshot,
    Theta,
    wait_for,
)
from patcher_pl.models import Weights
from patcher_pl.randomness import RandomState
from patcher_pl.supervision import Supervisor

logger = logging.getLogger(__name__)

_TELL_AFTER_S = 60.0


class RemoteAttacks:
    """Exchanges weights with attackers that run elsewhere.

    Args:
        settings: The concurrent attacker.
        refresh_every: Defender steps between two publications (k2).
        num_sft_steps: Defender steps before the first attack vector is used.

    Raises:
        ValueError: If no vector could ever be as fresh as it is asked to be.
    """

    def __init__(
        self, settings: ConcurrentAttacker, refresh_every: int, num_sft_steps: int
    ) -> None:
        limit = settings.max_staleness
        if limit is not None and limit < refresh_every - 1:
            raise ValueError(
                f"Patcher.attacker.max_staleness must be >= refresh_every - 1 = {refresh_every - 1}"
                f" or null, got {limit}. A vector is used for `refresh_every` steps: lower that, or "
                "raise `max_staleness`."
            )
        self.settings = settings
        self.slots = [Slot() for _ in settings.population]
        self.waited_s = 0.0
        self._refresh_every = refresh_every
        self._num_sft_steps = num_sft_steps
        self._num_used = 0
        self._num_wasted_before = 0
        self._num_spent_before = 0
        self._version = -1
        self._published_step = 0
        self._seed = 0
        self._life = ""
        self._mailbox: Mailbox | None = None
        self._supervisor: Supervisor | None = None
        if not settings.launch and settings.mailbox is not None:
            self._mailbox = Mailbox(settings.mailbox, len(settings.population))

    def connect(self, root: Path, supervisor: Supervisor) -> None:
        """Names the mailbox of attackers that were started for this run.

        Args:
            root: Its directory.
            supervisor: Keeps them running; looked after before every defender step and while
                waiting.
        """
        self._mailbox = Mailbox(root, len(self.slots))
        self._supervisor = supervisor

    def open(self, model: nn.Module, weights: Weights, seed: int) -> None:
        """Begins, or goes on with, a run.

        Args:
            model: What is published.
            weights: Owner of its weights.
            seed: Seed of the run's data.

        Raises:
            ConfigError: If nobody attacks, or the mailbox is too small.
        """
        self._model, self._weights, self._seed = model, weights, seed
        self._check_room(model)
        self._next_version = self.mailbox.prepare()
        self._version = -1
        self._life = uuid.uuid4().hex
        self.waited_s = 0.0
        self._num_used = 0
        self._num_spent_before = self._num_spent
        for slot in self.slots:
            slot.version = -1
            if slot.vector is not None:
                device = weights.parameters[0].device
                slot.vector = [tensor.to(device) for tensor in slot.vector]

    def close(self) -> None:
        """Tells the attackers that the run is over."""
        self.mailbox.finish(self._life)

    def exchange(
        self, step: int, *, is_due: bool, between: Callable[[], None]
    ) -> Sequence[Arrival]:
        """Publishes and picks up what is due before a defender step, and waits where it must.

        Args:
            step: Defender steps taken so far.
            is_due: Whether attack vectors are to be refreshed before this step.
            between: Called while waiting; may raise to end that, as if nothing had arrived.

        Returns:
            What was picked up; the slots hold it already.

        Raises:
            PatcherError: If an attacker fails for good.
        """
        self._supervise()
        published_before = self._version
        if self._is_idle(step) or (is_due and not self._is_fresh_enough(step)):
            self._publish(step)
        arrived: dict[int, Arrival] = {}
        if is_due:
            self._pick_up(arrived)
        if self._must_wait(step, arrived):
            self._wait(step, arrived, between)
        # Only now, so that an attacker which has fallen behind does not skip what is waited for.
        if is_due and self._version == published_before:
            self._publish(step)
        for arrival in arrived.values():
            self._use(arrival)
        return list(arrived.values())

    def vectors(self, step: int) -> list[Sequence[Tensor]]:
        """Returns the attack vectors of a defender step; none before the first attack.

        Args:
            step: Defender steps taken so far.
        """
        vectors = [slot.vector for slot in self.slots if slot.vector is not None]
        return list(combined(vectors, self.settings.combine, step=step, seed=self._seed))

    def staleness(self, step: int) -> int:
        """Defender steps since the oldest theta that a vector in use belongs to."""
        used = [slot.attacked_step for slot in self.slots if slot.vector is not None]
        return step - min(used, default=step)

    @property
    def mailbox(self) -> Mailbox:
        """Where weights are exchanged.

        Raises:
            ConfigError: If nobody has said so.
        """
        if self._mailbox is None:
            raise ConfigError(
                "ConcurrentAttacker.launch: `python -m patcher_pl fit` starts the attackers; a "
                "Trainer of your own does not. Set `launch: false` and a `mailbox`, and run "
                "`python -m patcher_pl attacker` beside it."
            )
        return self._mailbox

    def clocks(self) -> Clocks:
        """Returns how the time of this run has been spent so far, on both sides."""
        spent = [self.mailbox.read_spent(member) for member in range(len(self.slots))]
        return Clocks(
            time_s=time.monotonic(),
            waited_s=self.waited_s,
            busy_s=[each.busy_s for each in spent],
            idle_s=[each.idle_s for each in spent],
        )

    @property
    def num_restarts(self) -> int:
        """Restarts of attackers that were started for this run (count)."""
        return 0 if self._supervisor is None else self._supervisor.num_restarts

    @property
    def num_wasted(self) -> int:
        """Gradient evaluations of attacks that were never used, or are not yet (count)."""
        spent = self._num_spent - self._num_spent_before
        return self._num_wasted_before + max(0, spent - self._num_used)

    def state(self, names: Sequence[str]) -> dict[str, Any]:
        """Returns what a checkpoint keeps.

        Args:
            names: Names of the weights, in their order.
        """
        slots = [
            {
                "attacked_step": slot.attacked_step,
                "vector": dict(zip(names, slot.vector, strict=True)),
            }
            for slot in self.slots
            if slot.vector is not None
        ]
        return {"slots": slots, "num_wasted": self.num_wasted}

    def load_state(self, state: dict[str, Any], names: Sequence[str]) -> None:
        """Goes on with the vectors of a checkpoint, of as many attackers as there are now."""
        self._num_wasted_before = state["num_wasted"]
        for slot, saved in zip(self.slots, state["slots"], strict=False):
            slot.vector = [saved["vector"][name] for name in names]
            slot.attacked_step = saved["attacked_step"]

    @property
    def _num_spent(self) -> int:
        spent = [self.mailbox.read_spent(member) for member in range(len(self.slots))]
        return sum(each.finished + each.lost for each in spent)

    def _supervise(self) -> None:
        if self._supervisor is not None:
            self._supervisor.check()

    def _is_idle(self, step: int) -> bool:
        """Whether attackers have nothing to do although vectors are wanted soon, or again."""
        soon = self._num_sft_steps - self._refresh_every
        return not self.settings.lock_step and self._version < 0 and step >= soon

    def _is_fresh_enough(self, step: int) -> bool:
        """Whether an attack on what was published before would do at this step."""
        if self.settings.lock_step or self._version < 0:
            return False
        limit = self.settings.max_staleness
        return limit is None or step - self._published_step <= limit

    def _publish(self, step: int) -> None:
        self._published_step = step
        self._version, self._next_version = self._next_version, self._next_version + 1
        number = (step - self._num_sft_steps) // self._refresh_every
        random_state = None
        if self.settings.lock_step:
            random_state = RandomState.capture(self._weights.parameters[0].device).as_text()
        else:
            number += 1  # The first theta is published one refresh before the first pick-up.
        theta = Theta(
            life=self._life,
            version=self._version,
            step=step,
            number=max(number, 0),
            seed=self._seed,
            random_state=random_state,
        )
        self.mailbox.defender.publish(theta.version, shared_state(self._model), theta.to_info())

    def _pick_up(self, arrived: dict[int, Arrival]) -> None:
        """Adds the newest vectors that are newer than those in use."""
        for member, (slot, side) in enumerate(zip(self.slots, self.mailbox.attackers, strict=True)):
            known = arrived[member].report.theta.version if member in arrived else slot.version

            def is_wanted(snapshot: Snapshot, known: int = known) -> bool:
                return snapshot.info["theta"]["life"] == self._life and snapshot.version > known

            newest = side.newest()
            if newest is None or not is_wanted(newest):
                continue
            tensors = [torch.empty_like(parameter) for parameter in self._weights.parameters]
            named = dict(zip(self._weights.names, tensors, strict=True))
            found = side.fetch(named, is_wanted)
            if found is not None:
                report = Attacked.from_info(found.info)
                arrived[member] = Arrival(member, self._as_vector(tensors, report), report)

    def _as_vector(self, tensors: list[Tensor], report: Attacked) -> list[Tensor]:
        if report.kind == "vector":
            return tensors
        with torch.no_grad():
            pairs = zip(tensors, self._weights.parameters, strict=True)
            return [attacked - parameter.detach() for attacked, parameter in pairs]

    def _must_wait(self, step: int, arrived: dict[int, Arrival]) -> bool:
        if step < self._num_sft_steps:
            return False
        if self.settings.lock_step:
            versions = [
                arrived[member].report.theta.version if member in arrived else slot.version
                for member, slot in enumerate(self.slots)
            ]
            # Within a round of a resumed run, nothing was published and nothing is waited for.
            return any(version != self._version for version in versions)
        limit = self.settings.max_staleness
        for member, slot in enumerate(self.slots):
            has_vector = member in arrived or slot.vector is not None
            attacked = (
                arrived[member].report.theta.step if member in arrived else slot.attacked_step
            )
            if not has_vector or (limit is not None and step - attacked > limit):
                return True
        return False

    def _wait(self, step: int, arrived: dict[int, Arrival], between: Callable[[], None]) -> None:
        began_s = time.monotonic()

        def look() -> bool | None:
            self._pick_up(arrived)
            return None if self._must_wait(step, arrived) else True

        is_told = False

        def meanwhile() -> None:
            nonlocal is_told
            self._supervise()
            between()
            if not is_told and time.monotonic() - began_s > _TELL_AFTER_S:
                is_told = True
                logger.warning("Waiting for an attack at %s; is somebody there?", self.mailbox.root)

        try:
            wait_for(look, meanwhile)
        finally:
            self.waited_s += time.monotonic() - began_s

    def _use(self, arrival: Arrival) -> None:
        theta = arrival.report.theta
        self.slots[arrival.member] = Slot(arrival.vector, theta.step, theta.version)
        self._num_used += len(arrival.report.losses)
        if arrival.report.random_state is not None:
            device = self._weights.parameters[0].device
            RandomState.of_text(arrival.report.random_state, device).restore()

    def _check_room(self, model: nn.Module) -> None:
        size = sum(tensor.nbytes for tensor in shared_state(model).values())
        # Two snapshots and one that is being written, on every side.
        needed = 3 * size * (1 + len(self.slots))
        self.mailbox.create()
        free = shutil.disk_usage(self.mailbox.root).free
        if needed > free:
            raise ConfigError(
                f"ConcurrentAttacker.mailbox: {self.mailbox.root} has {free / 2**30:.1f} GiB free; "
                f"up to {needed / 2**30:.1f} GiB are exchanged there. Enlarge it, or set `mailbox` "
                "to a directory on another file system."
            )

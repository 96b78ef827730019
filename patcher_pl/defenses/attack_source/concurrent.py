"""Attacks in processes of their own: publishes theta, picks up vectors, waits where it must."""

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
from patcher_pl.defenses.attack_source.base import (
    AttackSource,
    Vector,
    account_for_attack,
    add_gradients_at,
    checked_norm,
)
from patcher_pl.defenses.attack_source.slots import Clocks, Slot
from patcher_pl.defenses.outer_loss import Term
from patcher_pl.defenses.saved_tensors import own_parts
from patcher_pl.defenses.step import Step
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
from patcher_pl.validation import require

logger = logging.getLogger(__name__)

_TELL_AFTER_S = 60.0


class Concurrent(AttackSource):
    """Exchanges weights with attackers that run elsewhere; see `ConcurrentAttacker`.

    Args:
        owner: Class of the defense, for messages.
        settings: The concurrent attacker.
        refresh_every: Defender steps between two publications (k2).
        num_sft_steps: Defender steps before the first attack vector is used.

    Raises:
        ValueError: If no vector could ever be as fresh as it is asked to be.
    """

    def __init__(
        self, owner: str, settings: ConcurrentAttacker, *, refresh_every: int, num_sft_steps: int
    ) -> None:
        super().__init__(settings, refresh_every=refresh_every, num_sft_steps=num_sft_steps)
        limit = settings.max_staleness
        require(
            owner,
            limit is None or limit >= refresh_every - 1,
            "attacker.max_staleness",
            f">= refresh_every - 1 = {refresh_every - 1} or null",
            "A vector is used for `refresh_every` steps: lower that, or raise `max_staleness`.",
            value=limit,
        )
        self.settings = settings
        self.slots = [Slot() for _ in settings.population]
        self.waited_s = 0.0
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

    def open(self, step: Step) -> None:
        """Begins, or goes on with, a run.

        Raises:
            ConfigError: If nobody attacks, or the mailbox is too small.
        """
        self._model, self._weights, self._seed = step.model, step.all_weights, step.seed
        # Before the first publication: a disk that fills up in the middle of a run ends it.
        self._check_room(step.model)
        self._next_version = self.mailbox.prepare()
        self._version = -1
        # Tells this start of the run from an earlier one, whose messages may still lie in the
        # mailbox.
        self._life = uuid.uuid4().hex
        self.waited_s = 0.0
        self._num_used = 0
        self._num_spent_before = self._num_spent
        for slot in self.slots:
            # Versions belong to a life; the vectors themselves, of the checkpoint, are still good.
            slot.version = -1
            if slot.vector is not None:
                device = self._weights.parameters[0].device
                slot.vector = [tensor.to(device) for tensor in slot.vector]

    def close(self) -> None:
        """Tells the attackers that the run is over."""
        self.mailbox.finish(self._life)

    def release(self) -> None:
        super().release()
        self.slots = [Slot() for _ in self.slots]

    def prepare(self, step: Step) -> None:
        is_due = self.is_due(step)
        # May raise to end the run: nothing of the step is counted before it.
        arrived = self._exchange(step.number, is_due, step.check_for_stop)
        if is_due:
            self.num_attacks += 1
            # Where it would be if the attacks so far had taken their batches from it.
            position = self.attacker.steps_before(step.seed, self.num_attacks)
            step.attack_stream.load_state_dict({"position": position})
        for member, slot in arrived.items():
            assert slot.vector is not None
            assert slot.report is not None
            number, own = slot.report.theta.number, self.settings.population[member]
            seed = step.seed if own.seed is None else own.seed
            account_for_attack(
                step,
                own.attacker.draw(seed, number),
                norm=checked_norm(step, slot.vector),
                losses=slot.report.losses,
                num_tokens=slot.report.num_tokens,
                steps_before=own.attacker.steps_before(seed, number),
                num_steps_from_theta=slot.report.num_steps_from_theta,
                tag="attack" if len(self.slots) == 1 else f"attack_{member}",
            )

    def has_attacked(self, step: Step) -> bool:
        return any(slot.vector is not None for slot in self.slots)

    def add_gradients(self, step: Step, terms: Sequence[Term], share: float) -> dict[str, Tensor]:
        return add_gradients_at(step, self.vectors_at(step.number), terms, share)

    def require_several_processes(self, owner: str) -> None:
        raise ConfigError(
            f"{owner}.attacker: a ConcurrentAttacker needs a defender on one device, whose weights "
            "are whole, got a strategy for several. Use a FineTuningAttacker, or "
            "`trainer.devices: 1` and no strategy."
        )

    def _exchange(self, step: int, is_due: bool, between: Callable[[], None]) -> dict[int, Slot]:
        """Publishes and picks up what is due before a defender step, and waits where it must.

        Args:
            step: Defender steps taken so far.
            is_due: Whether attack vectors are to be refreshed before this step.
            between: Called while waiting; may raise to end that, as if nothing had arrived.

        Returns:
            What was picked up, by member; the slots hold it already.

        Raises:
            PatcherError: If an attacker fails for good.
        """
        self._supervise()
        published_before = self._version
        # Published before anything is picked up, where a vector has to be waited for: its attack
        # begins now.
        if self._is_idle(step) or (is_due and not self._is_fresh_enough(step)):
            self._publish(step)
        arrived: dict[int, Slot] = {}
        if is_due:
            self._pick_up(arrived)
        if self._must_wait(step, arrived):
            self._wait(step, arrived, between)
        # Only now, so that an attacker which has fallen behind does not skip what is waited for.
        if is_due and self._version == published_before:
            self._publish(step)
        for member, slot in arrived.items():
            self._use(member, slot)
        return arrived

    def vectors_at(self, step: int) -> list[Vector]:
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

    def save(self, checkpoint: dict[str, Any], weights: Weights) -> None:
        super().save(checkpoint, weights)
        slots = [
            {
                "attacked_step": slot.attacked_step,
                "vector": dict(zip(weights.names, slot.vector, strict=True)),
            }
            for slot in self.slots
            if slot.vector is not None
        ]
        checkpoint["defense"]["remote"] = {"slots": slots, "num_wasted": self.num_wasted}

    def load(self, checkpoint: dict[str, Any], weights: Weights, path: Any) -> None:
        """Goes on with the vectors of a checkpoint, of as many attackers as there are now."""
        super().load(checkpoint, weights, path)
        attacked_step = self.num_sft_steps + (self.num_attacks - 1) * self.refresh_every
        saved = checkpoint["defense"].get("remote", {"slots": [], "num_wasted": 0})
        self._num_wasted_before = saved["num_wasted"]
        found = [
            (own_parts(one["vector"], weights), one["attacked_step"]) for one in saved["slots"]
        ]
        if not found:  # A run that attacked in between, or not yet.
            found = [(vector, attacked_step) for vector in self.vectors[-1:]]
        self.vectors = []
        for slot, (vector, step) in zip(self.slots, found, strict=False):
            slot.vector, slot.attacked_step = vector, step

    @property
    def _num_spent(self) -> int:
        spent = [self.mailbox.read_spent(member) for member in range(len(self.slots))]
        return sum(each.finished + each.lost for each in spent)

    def _supervise(self) -> None:
        if self._supervisor is not None:
            self._supervisor.check()

    def _is_idle(self, step: int) -> bool:
        """Whether attackers have nothing to do although vectors are wanted soon, or again."""
        soon = self.num_sft_steps - self.refresh_every
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
        number = (step - self.num_sft_steps) // self.refresh_every
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

    def _pick_up(self, arrived: dict[int, Slot]) -> None:
        """Adds the newest vectors that are newer than those in use."""
        for member, side in enumerate(self.mailbox.attackers):
            known = arrived.get(member, self.slots[member]).version

            def is_wanted(snapshot: Snapshot, known: int = known) -> bool:
                return snapshot.info["theta"]["life"] == self._life and snapshot.version > known

            newest = side.newest()
            if newest is None or not is_wanted(newest):
                continue
            tensors = [torch.empty_like(parameter) for parameter in self._weights.parameters]
            named = dict(zip(self._weights.names, tensors, strict=True))
            # Asked again while reading: the attacker may have published a newer one in between.
            found = side.fetch(named, is_wanted)
            if found is not None:
                report = Attacked.from_info(found.info)
                vector, theta = self._as_vector(tensors, report), report.theta
                arrived[member] = Slot(vector, theta.step, theta.version, report)

    def _as_vector(self, tensors: list[Tensor], report: Attacked) -> list[Tensor]:
        if report.kind == "vector":
            return tensors
        with torch.no_grad():
            pairs = zip(tensors, self._weights.parameters, strict=True)
            # Anchored where the defender is now: its own steps since then count as part of the way.
            return [attacked - parameter.detach() for attacked, parameter in pairs]

    def _must_wait(self, step: int, arrived: dict[int, Slot]) -> bool:
        if step < self.num_sft_steps:
            return False
        slots = [arrived.get(member, slot) for member, slot in enumerate(self.slots)]
        if self.settings.lock_step:
            # Within a round of a resumed run, nothing was published and nothing is waited for.
            return any(slot.version != self._version for slot in slots)
        limit = self.settings.max_staleness
        return any(
            slot.vector is None or (limit is not None and step - slot.attacked_step > limit)
            for slot in slots
        )

    def _wait(self, step: int, arrived: dict[int, Slot], between: Callable[[], None]) -> None:
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

    def _use(self, member: int, slot: Slot) -> None:
        self.slots[member], report = slot, slot.report
        assert report is not None
        self._num_used += len(report.losses) * report.evaluations_per_step
        if report.random_state is not None:
            device = self._weights.parameters[0].device
            # In lock-step the attack has drawn from the defender's generators, as one in its
            # process would have.
            RandomState.of_text(report.random_state, device).restore()

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

"""The attacker, or the population of attackers, that runs beside the defender."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from patcher_pl.attackers.base import Attacker, AttackOutcome
from patcher_pl.attackers.carry import Carried
from patcher_pl.attackers.combine import Combine
from patcher_pl.data.mixing import Mixture
from patcher_pl.errors import ConfigError
from patcher_pl.models.weights import Weights
from patcher_pl.types import Batch
from patcher_pl.validation import require


@dataclass(frozen=True, kw_only=True)
class Member:
    """One attacker of a population.

    Args:
        attacker: What it does; each its own learning rate, say.
        seed: Decides subset and order of its data and its random numbers; None takes the run's data
            in the run's order.
        data: What it trains on; None takes the attack data of the run.
    """

    attacker: Attacker
    seed: int | None = None
    data: Mixture | None = None

    def __post_init__(self) -> None:
        if isinstance(self.attacker, ConcurrentAttacker):
            raise ValueError(  # noqa: TRY004  # A setting that does not fit, as any other.
                "Member.attacker must be an attacker that runs in one process, got a "
                "ConcurrentAttacker. List its members in one population."
            )
        if self.attacker.num_vectors > 1:
            raise ValueError(
                "Member.attacker must give one attack vector, as that is what a mailbox carries, got "
                f"{self.attacker.num_vectors} (vector_steps, num_random_points). Set `vector_steps: null`, or use a "
                "FineTuningAttacker without a ConcurrentAttacker."
            )


@dataclass(frozen=True, kw_only=True)
class ConcurrentAttacker(Attacker):
    """Attacks published weights in processes of their own while the defender trains on.

    Every `refresh_every` steps (k2) the defender publishes theta and picks up what was made of an
    earlier one. Each attacker takes the newest theta there is, attacks it for `num_steps` (k1) and
    publishes the outcome. What the defender trains against is therefore some steps old: its
    *staleness* counts the defender's steps since the theta that was attacked. It is `refresh_every`
    at pick-up where attackers keep up, and grows by one with every step.

    `python -m patcher_pl fit` starts, watches and ends the attackers' processes. With `launch` off,
    they are jobs of their own (`python -m patcher_pl attacker`) that share `mailbox` with it.

    Args:
        population: The attackers (at least one).
        devices: Device of each attacker (`cuda:1`); None puts them where the defender is.
        max_staleness: Largest staleness of any step (count, >= `refresh_every` - 1); beyond it the
            defender waits. None never waits, except for the first attack.
        lock_step: Attack exactly the theta of each refresh, while the defender waits: the run is the
            sequential one to the last bit, if it has one attacker without a `seed`.
        combine: Whether the members' vectors are used `in_turn`, one per defender step, one per step
            `at_random`, or all in every step with the `average` of their losses, which costs one
            gradient evaluation each.
        anchor: What the vector starts from: the defender's weights at pick-up (`current`, as in the
            paper, so that theta + v is the attacked model) or the weights that were attacked
            (`published`, so that v is what the attack did). The same in lock step.
        mailbox: Directory that all processes see; None makes a private one on /dev/shm.
        launch: Whether `fit` starts the attackers.
        max_failures: Failures of an attacker in a row, without an attack in between, that end the
            run (count, >= 1). Until then, it is restarted and the defender goes on.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Patcher, https://arxiv.org/abs/2606.07970, the parallel form.
    """

    population: list[Member]
    devices: list[str] | None = None
    max_staleness: int | None = None
    lock_step: bool = False
    combine: Combine = "in_turn"
    anchor: Literal["current", "published"] = "current"
    mailbox: Path | None = None
    launch: bool = True
    max_failures: int = 5

    def __post_init__(self) -> None:
        require(
            self,
            bool(self.population),
            "population",
            "at least one attacker",
            "Use FineTuningAttacker for attacks in between.",
        )
        require(
            self,
            self.devices is None or len(self.devices) == len(self.population),
            "devices",
            f"one device for each of {len(self.population)} attackers, or null",
            "Name a device twice to share it.",
        )
        require(
            self,
            self.max_staleness is None or self.max_staleness >= 0,
            "max_staleness",
            ">= 0 or null",
            "Use null never to wait.",
        )
        require(
            self,
            self.launch or self.mailbox is not None,
            "mailbox",
            "a directory if `launch` is false",
            "Name one that the attackers' jobs see as well.",
        )
        remedy = "Use 1 to end at the first failure."
        require(self, self.max_failures >= 1, "max_failures", ">= 1", remedy)

    @property
    def num_steps(self) -> int:  # type: ignore[override]
        """Steps of the longest attack (k1)."""
        return max(member.attacker.num_steps for member in self.population)

    def steps_before(self, seed: int, number: int) -> int:
        """See `Attacker.steps_before`; those of the longest attacks, where there are several."""
        if len(self.population) == 1:
            return self.population[0].attacker.steps_before(seed, number)
        return number * self.num_steps

    def attack(
        self,
        model: nn.Module,
        weights: Weights,
        batches: Iterator[Batch],
        before_step: Callable[[], None] = lambda: None,
        start: Carried | None = None,
    ) -> AttackOutcome:
        """Refuses: the members attack in processes of their own.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"ConcurrentAttacker.population: {len(self.population)} attackers in processes of their "
            "own, asked to attack in this one, where they would be as one. Take a member's `attacker`."
        )

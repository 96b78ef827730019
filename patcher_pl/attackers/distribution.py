"""Simulated attacks that are drawn from a distribution, one after the other."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from patcher_pl.attackers.base import Attacker, AttackOutcome, DrawnAttack
from patcher_pl.attackers.carry import Carried
from patcher_pl.attackers.fine_tuning import FineTuningAttacker
from patcher_pl.attackers.inner_problem import InnerProblem
from patcher_pl.data.mixing import Mixture
from patcher_pl.data.variant import AttackData
from patcher_pl.errors import ConfigError
from patcher_pl.fields import COUNTS, RANGES, has_field, with_field
from patcher_pl.models.weights import Weights
from patcher_pl.randomness import derive_seed
from patcher_pl.types import Batch
from patcher_pl.validation import require

Setting = float | int | str

# Short names, as those of the red team's grids.
_FIELDS = {"lr": "optimizer.lr"}
_LOGARITHMIC = {**RANGES, "poison_ratio": False}
_OF_DATA = ("poison_ratio", "batch_size")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Attacks of one kind, and what differs among them.

    Args:
        attacker: What they have in common.
        label: Name in TensorBoard; None makes one of weights and optimizer.
        weight: How often it comes, relative to others that are drawn `at_random` (> 0).
        data: What it trains on; None takes the run's attack data.
        space: What is drawn for every attack, by the dotted fields of `attacker`, in the words of the
            red team's `search`: [low, high] of `lr` and `num_steps` (by their logarithm),
            `num_warmup_steps` and `poison_ratio` (share of harmful rows); choices of all others, such
            as `batch_size`, `schedule`, `lora.rank` or `carry.scale`.

    Raises:
        ValueError: If `space` names no setting, or a value is out of its range.
    """

    attacker: FineTuningAttacker
    label: str | None = None
    weight: float = 1.0
    data: Mixture | None = None
    space: Mapping[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self, self.weight > 0, "weight", "> 0", "Leave a kind out that shall not come.")
        for name, values in self.space.items():
            self._check(name, values)

    @property
    def name(self) -> str:
        """Name in TensorBoard."""
        if self.label is not None:
            return self.label
        trained = "lora" if self.attacker.lora is not None else self.attacker.trains
        return f"{trained}_{type(self.attacker.optimizer).__name__.lower()}"

    @property
    def num_steps(self) -> int:
        """Steps of the longest attack (count)."""
        return int(self.space.get("num_steps", [self.attacker.num_steps])[-1])

    def draw(self, seed: int, number: int) -> DrawnAttack:
        """One attack of this kind.

        Args:
            seed: Decides, together with the number, what is drawn.
            number: Attacks of this kind before it (count).
        """
        generator = random.Random(derive_seed(seed, "settings", number))
        settings = {name: _drawn(name, self.space[name], generator) for name in sorted(self.space)}
        attacker = self.attacker
        # The length first: others are checked against it.
        for name in sorted(settings, key=lambda one: one != "num_steps"):
            value = settings[name]
            if name == "num_steps":
                # A warm-up must fit; where it is drawn too, it is set next.
                warmup = min(attacker.num_warmup_steps, int(value))
                attacker = replace(attacker, num_steps=int(value), num_warmup_steps=warmup)
            elif name == "num_warmup_steps":
                settings[name] = min(int(value), attacker.num_steps)
                attacker = replace(attacker, num_warmup_steps=int(settings[name]))
            elif name not in _OF_DATA:
                attacker = with_field(attacker, _FIELDS.get(name, name), value)
        data: dict[str, Any] = {name: settings[name] for name in _OF_DATA if name in settings}
        found = attacker.draw(seed, number)
        return replace(
            found,
            kind=self.name,
            data=AttackData(data=self.data, **data),
            settings={**settings, "num_steps": found.attacker.num_steps},
        )

    def _check(self, name: str, values: list[Any]) -> None:
        path = _FIELDS.get(name, name)
        rule = "fields of `attacker`, `batch_size` or `poison_ratio`"
        is_known = name in _OF_DATA or has_field(self.attacker, path)
        require(
            self, is_known, "space", rule, "Give a dotted field, as `optimizer.lr`.", value=name
        )
        if path not in _LOGARITHMIC:
            is_list = bool(values)
            require(self, is_list, f"space.{name}", "choices, at least one", value=values)
        else:
            numbers = len(values) == 2 and all(type(end) in (int, float) for end in values)
            low = 0 if not _LOGARITHMIC[path] else math.nextafter(0, 1)
            is_range = numbers and low <= values[0] <= values[1]
            rule = "[low, high] with low <= high" + (", above 0" if low else "")
            require(self, is_range, f"space.{name}", rule, value=values)
        for value in values:
            if name in _OF_DATA:
                AttackData(**{name: value})
            elif path != "num_warmup_steps":
                with_field(replace(self.attacker, num_warmup_steps=0), path, value)


@dataclass(frozen=True, kw_only=True)
class AttackDistribution(Attacker):
    """Draws every simulated attack from a distribution over kinds of attacks and their settings.

    What the n-th attack is depends on the run's seed and on n alone, so that a resumed run goes on
    with the same attacks. An attacker who tunes has a distribution to choose from; training against a
    single attack makes the model hold against that one.

    Each attack costs its steps; one with a `batch_size` of its own costs as many gradient evaluations
    per step as the run's batches that it amounts to, rounded up. Kinds whose attacker has `carry` keep
    one vector each.

    Args:
        kinds: At least one; names (`label`) must differ.
        order: Kinds `in_turn`, or each drawn `at_random` by `weight`.

    Raises:
        ValueError: If a value is out of its range.

    References:
        That defenses fall to attacks with other settings than they were trained against: Qi et al.,
        2024, https://arxiv.org/abs/2412.07097. Sampling the adversary's learning rate and data in
        training: TAR, https://arxiv.org/abs/2408.00761.
    """

    kinds: list[Kind]
    order: Literal["in_turn", "at_random"] = "in_turn"

    def __post_init__(self) -> None:
        names = [kind.name for kind in self.kinds]
        is_set = bool(names) and len(set(names)) == len(names)
        rule = "kinds of different names (`label`), at least one"
        require(self, is_set, "kinds", rule, value=names)
        is_known = self.order in ("in_turn", "at_random")
        require(self, is_known, "order", "in_turn or at_random", "Use in_turn for equal shares.")
        weights = [kind.weight for kind in self.kinds]
        is_even = self.order == "at_random" or len(set(weights)) == 1
        remedy = "Set `order: at_random`, or leave the weights away."
        require(self, is_even, "order", "at_random where weights differ", remedy)

    @property
    def kind_names(self) -> Sequence[str]:
        return [kind.name for kind in self.kinds]

    @property
    def num_steps(self) -> int:  # type: ignore[override]
        """Steps of the longest attack (k1)."""
        return max(kind.num_steps for kind in self.kinds)

    @property
    def num_vectors(self) -> int:
        return max(kind.attacker.num_vectors for kind in self.kinds)

    @property
    def is_carried(self) -> bool:
        return any(kind.attacker.is_carried for kind in self.kinds)

    @property
    def is_differentiable(self) -> bool:
        return all(kind.attacker.is_differentiable for kind in self.kinds)

    @property
    def works_sharded(self) -> bool:
        return all(kind.attacker.works_sharded for kind in self.kinds)

    @property
    def works_with_fsdp1(self) -> bool:
        return all(kind.attacker.works_with_fsdp1 for kind in self.kinds)

    def draw(self, seed: int, number: int) -> DrawnAttack:
        """See `Attacker.draw`."""
        place = self._place(seed, number)
        if self.order == "in_turn":
            own_number = number // len(self.kinds)
        else:
            own_number = sum(self._place(seed, earlier) == place for earlier in range(number))
        kind = self.kinds[place]
        return kind.draw(derive_seed(seed, "kind", kind.name), own_number)

    def _place(self, seed: int, number: int) -> int:
        """Which kind an attack is of."""
        if self.order == "in_turn":
            return number % len(self.kinds)
        weights = [kind.weight for kind in self.kinds]
        generator = random.Random(derive_seed(seed, "kind", number))
        return generator.choices(range(len(weights)), weights)[0]

    def inner_problem(self, batches: Iterator[Batch]) -> InnerProblem:
        raise self._undrawn()

    def attack(
        self,
        model: nn.Module,
        weights: Weights,
        batches: Iterator[Batch],
        before_step: Callable[[], None] = lambda: None,
        start: Carried | None = None,
    ) -> AttackOutcome:
        """Refuses: an attack is `draw`n first.

        Raises:
            ConfigError: Always.
        """
        raise self._undrawn()

    def _undrawn(self) -> ConfigError:
        return ConfigError(
            f"AttackDistribution: asked to attack with {len(self.kinds)} kinds of attacks at "
            "once. Take the attacker of one of its draws, or a FineTuningAttacker."
        )


def _drawn(name: str, values: list[Any], generator: random.Random) -> Setting:
    path = _FIELDS.get(name, name)
    if path not in _LOGARITHMIC:
        return generator.choice(values)
    low, high = values
    if _LOGARITHMIC[path]:
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
    else:
        value = generator.uniform(low, high)
    if name in COUNTS:
        return min(high, max(low, round(value)))
    return min(high, max(low, float(f"{value:.3g}")))

"""A grid over the settings of attacks, and the cells that it is made of."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

from patcher_pl.data.mixing import Mixture
from patcher_pl.redteam.base import Attack
from patcher_pl.redteam.variation import (
    Setting,
    Varied,
    varied_attack,
    varied_data,
    varied_name,
)


@dataclass(frozen=True, kw_only=True)
class Grid(Varied):
    """Values that are tried for every attack that has such a setting; all combinations of them.

    An empty list leaves a setting as the attack, or the red team's data, has it.

    Args:
        lr: Step sizes of the attack's optimizer.
        num_steps: Optimizer steps (counts); ends the attack there, its schedule included.
        batch_size: Rows per step (counts).
        schedule: Learning-rate curves.
        num_warmup_steps: Steps of linear warm-up (counts).
        template: Prompt templates, see `Asking`.
        poison_ratio: Shares of harmful rows (in [0, 1]).
        num_examples: Rows of the attacker's data (counts).

    Raises:
        ValueError: If a list holds a value twice.
    """

    def __post_init__(self) -> None:
        for name, values in asdict(self).items():
            if len(set(values)) < len(values):
                raise ValueError(f"Grid.{name} must hold different values, got {values}.")

    def combinations(self, attack: Attack) -> Iterator[dict[str, Setting]]:
        """Settings of every cell of one attack; one empty entry where nothing varies.

        Leaves out shares of harmful rows that would take from an attack what it cannot do without.
        """
        varied = self.lists_of(attack)
        for chosen in itertools.product(*varied.values()):
            settings = dict(zip(varied, chosen, strict=True))
            share = settings.get("poison_ratio")
            if not (
                (share == 1 and "benign" in attack.needed_rows)
                or (share == 0 and "harmful" in attack.needed_rows)
            ):
                yield settings


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One attack with one seed: the unit that runs, fails, and is resumed by itself.

    Args:
        attack: What is done, varied settings applied.
        data: What the attacker trains on, varied settings applied.
        seed: Seed of data subset, order, initialization and sampling.
        family: Name of the attack without varied settings.
        varied: Those settings.
    """

    attack: Attack
    data: Mixture
    seed: int
    family: str
    varied: dict[str, Setting] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the attack in results, varied settings included."""
        return varied_name(self.family, self.varied)


def varied_cells(
    attack: Attack, data: Mixture, settings: dict[str, Setting], seeds: Sequence[int]
) -> list[Cell]:
    """The cells of one attack with some settings replaced, one per seed.

    Raises:
        ValueError: If a value is out of its range.
    """
    changed, changed_data = varied_attack(attack, settings), varied_data(data, settings)
    return [
        Cell(attack=changed, data=changed_data, seed=seed, family=attack.name, varied=settings)
        for seed in seeds
    ]

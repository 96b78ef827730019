"""A grid over the settings of attacks, and the cells that it is made of."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from patcher_pl.data.mixing import Mixture
from patcher_pl.redteam.base import Attack
from patcher_pl.redteam.variation import (
    Setting,
    field_of,
    has_setting,
    varied_attack,
    varied_data,
    varied_name,
)
from patcher_pl.reports.results import CurveKey


class Grid(dict[str, list[Setting]]):
    """Values that are tried for every attack that has such a setting; all combinations of them.

    Args:
        values: Dotted fields of attacks (`batch_size`, `optimizer.lr`, `lora.rank`, ...) or of the
            red team's data (`data.poison_ratio`, ...), each with what to try. `num_steps`, the
            length of an attack, is `attack_steps` cut off there; `lr`, `template`, `poison_ratio`
            and `num_examples` are short for `optimizer.lr`, `asking.template` and fields of `data`.
            An empty list leaves a setting as it is.

    Raises:
        ValueError: If a value is there twice, or is neither a number nor a word.
    """

    def __init__(self, **values: list[Any]) -> None:
        super().__init__(values)
        for name, entries in values.items():
            if not all(isinstance(entry, float | int | str) for entry in entries):
                raise ValueError(f"Grid.{name} must hold numbers or words, got {entries}.")
            if len(set(entries)) < len(entries):
                raise ValueError(f"Grid.{name} must hold different values, got {entries}.")
        if len({field_of(name) for name in values}) < len(values):
            raise ValueError(
                f"Grid must name a setting once, got {', '.join(values)}, of which two are the "
                "same. Leave one out."
            )

    def combinations(self, attack: Attack) -> Iterator[dict[str, Setting]]:
        """Settings of every cell of one attack; one empty entry where nothing varies.

        Leaves out shares of harmful rows that would take from an attack what it cannot do without.
        """
        varied = {
            name: values for name, values in self.items() if values and has_setting(attack, name)
        }
        for chosen in itertools.product(*varied.values()):
            settings = dict(zip(varied, chosen, strict=True))
            shares = {field_of(name): value for name, value in settings.items()}
            share = shares.get("data.poison_ratio")
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


@dataclass(frozen=True)
class ModelName:
    """How the attacked model is called in results.

    Args:
        defense: Name of its defense.
        k1: Its simulated attack steps, where it has them.
        train_seed: Seed that it was trained with, where it is known.
    """

    defense: str
    k1: int | None = None
    train_seed: int | None = None

    @property
    def model_key(self) -> tuple[str, int | None, int | None]:
        """What tells its curves from those of other models."""
        return (self.defense, self.k1, self.train_seed)

    def key(self, cell: Cell) -> CurveKey:
        """What tells the curve of a cell from all others."""
        return (*self.model_key, cell.name, cell.seed)


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

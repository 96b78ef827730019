"""One defense of a comparison, and the settings that are tried for it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patcher_pl.jobs import ConfigFile, Fit, OptionValue, seed_options
from patcher_pl.validation import require


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A defense and the space that its settings are searched in.

    Args:
        fit: Configuration of `fit` that trains it.
        space: Options of `fit` (dotted names), each with the values to try. The first values
            together are the first trial.
        options: Options of `fit` that differ from `fit` in every trial.
        min_budget: Smallest budget at which it takes part in a study of several (gradient
            evaluations, count, >= 0), such as one that its simulated attacks fit into.

    Raises:
        ValueError: If an option has no values, or one twice, or a value is out of its range.
    """

    fit: ConfigFile
    space: Mapping[str, list[OptionValue]] = field(default_factory=dict)
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    min_budget: int = 0

    def __post_init__(self) -> None:
        require(self, self.min_budget >= 0, "min_budget", ">= 0")
        for name, values in self.space.items():
            if not values or any(values.count(value) > 1 for value in values):
                raise ValueError(
                    f"Contender.space must have different values for {name}, got {values}. "
                    "Give each value once, the one to try first in front."
                )

    @property
    def num_combinations(self) -> int:
        """Points of the space (count)."""
        return math.prod(len(values) for values in self.space.values())

    def trials(self, number: int, seed: int) -> list[dict[str, Any]]:
        """Options of the trials: the first values, then points spread over the space, none twice.

        The points are those of a scrambled Halton sequence, so that a few of them try the values of
        every option about equally often.

        Raises:
            ValueError: If the space has fewer points.

        References:
            Owen, 2017, A randomized Halton algorithm in R, https://arxiv.org/abs/1706.02808.
        """
        from scipy.stats import qmc

        if number > self.num_combinations:
            raise ValueError(
                f"space: has {self.num_combinations} points for {number} trials, and every defense "
                f"must get as many. Add values to it, or lower selection.num_trials."
            )
        first = tuple(0 for _ in self.space)
        chosen = {first: None}
        if number > 1:
            sizes = [len(values) for values in self.space.values()]
            sequence = qmc.Halton(d=len(sizes), rng=seed)
            while len(chosen) < number:
                point = qmc.scale(sequence.random(1), [0] * len(sizes), sizes)[0]
                chosen[tuple(int(place) for place in point)] = None
        return [
            {name: values[at] for at, (name, values) in zip(point, self.space.items(), strict=True)}
            for point in chosen
        ]

    def fits(
        self,
        common: Mapping[str, Any],
        chosen: Mapping[str, Any],
        redteam: Path,
        seeds: Sequence[int],
        directory: Path,
    ) -> list[Fit]:
        """One run per seed below `directory`.

        Args:
            common: Options of all defenses; this one's own go before them.
            chosen: Point of the space; goes before both.
            redteam: Configuration of the red team that attacks the models.
            seeds: Of training and attacks.
            directory: Where the runs go.
        """
        options = {"redteam": redteam.resolve(), **common, **self.options, **chosen}
        return [
            Fit.plan(directory / f"seed-{seed}", Path(self.fit), {**options, **seed_options(seed)})
            for seed in seeds
        ]

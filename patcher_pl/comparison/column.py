"""A comparison of defenses at one budget: a search of equal size for each, then one model per seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patcher_pl.comparison.contender import Contender
from patcher_pl.comparison.selection import Selection
from patcher_pl.comparison.trials import Models, PlannedTrial, plan_trials, rated
from patcher_pl.errors import ConfigError
from patcher_pl.jobs import Fit
from patcher_pl.reports.comparison import DefenseTrial


def require_fresh_seeds(seeds: Sequence[int], selection: Selection) -> None:
    """Sees to it that models are not trained with seeds that their settings were chosen with.

    Raises:
        ConfigError: If a seed is in both.
    """
    if shared := sorted(set(seeds) & set(selection.seeds)):
        raise ConfigError(
            f"seeds: must not be among selection.seeds, got {shared} in both. Settings that were "
            "chosen with a seed look better with it."
        )


@dataclass(frozen=True)
class Column:
    """What is trained and attacked at one budget.

    Args:
        budget: Gradient evaluations of every run (forward-backward passes, count).
        defenses: Those that take part, by name.
        redteam: Attacks the models at the end.
        selection: The search.
        seeds: Of the models, and of the attacks on them.
        common: Options of every run; those of a defense go before.
        directory: The runs go below `search` and `models` in it.
        searched: The trials of every defense.
    """

    budget: int
    defenses: Mapping[str, Contender]
    redteam: Path
    selection: Selection
    seeds: Sequence[int]
    common: Mapping[str, Any]
    directory: Path
    searched: Mapping[str, Sequence[PlannedTrial]]

    @classmethod
    def plan(
        cls,
        defenses: Mapping[str, Contender],
        redteam: Path,
        selection: Selection,
        seeds: Sequence[int],
        budget: int,
        options: Mapping[str, Any] | None,
        directory: Path,
    ) -> "Column":
        """Plans the search; a defense whose `min_budget` is larger takes no part.

        Raises:
            ConfigError: If the space of a defense has fewer points than there are trials.
        """
        taking_part = {
            name: contender
            for name, contender in defenses.items()
            if contender.min_budget <= budget
        }
        common = {
            "trainer.max_steps": -1,
            "trainer.max_epochs": -1,
            "max_gradient_evaluations": budget,
            **(options or {}),
        }
        searched = plan_trials(taking_part, selection, common, directory / "search")
        return cls(budget, taking_part, redteam, selection, seeds, common, directory, searched)

    @property
    def search(self) -> list[Fit]:
        """Every run of the search."""
        return [fit for own in self.searched.values() for trial in own for fit in trial.fits]

    def trials(self) -> list[DefenseTrial]:
        """Every trial with what it found, the best of each defense chosen."""
        return rated(self.selection, self.searched)

    def models(self, chosen: Mapping[str, Mapping[str, Any]]) -> Models:
        """The models of the defenses in `chosen`, with the options that it gives them."""
        return {
            name: self.defenses[name].fits(
                self.common, options, self.redteam, self.seeds, self.directory / "models" / name
            )
            for name, options in chosen.items()
        }

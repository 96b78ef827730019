"""Every run of `fit` that a comparison consists of, and what these runs found."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patcher_pl.comparison.contender import Contender
from patcher_pl.comparison.selection import Selection, trial_of
from patcher_pl.errors import ConfigError
from patcher_pl.jobs import Fit
from patcher_pl.reports.comparison import DefenseTrial, TrainingCost
from patcher_pl.reports.results import Curve

logger = logging.getLogger(__name__)

Models = dict[str, list[Fit]]
"""The compared models, one per seed, by defense."""


@dataclass(frozen=True)
class PlannedTrial:
    """One point of a defense's space.

    Args:
        number: 0 for the first values of the space.
        options: Options of `fit` that are tried.
        fits: Its runs, one per seed.
    """

    number: int
    options: Mapping[str, Any]
    fits: Sequence[Fit]

    def outcome(self, defense: str) -> DefenseTrial:
        """What its runs found, or which of them failed."""
        if all(fit.is_done for fit in self.fits):
            results = [fit.results for fit in self.fits]
            return trial_of(defense, self.number, self.options, results)
        logs = ", ".join(str(fit.log) for fit in self.fits if not fit.is_done)
        error = f"`fit` failed; see {logs}"
        return DefenseTrial(
            defense=defense, number=self.number, options=dict(self.options), error=error
        )


def plan_trials(
    defenses: Mapping[str, Contender],
    selection: Selection,
    common: Mapping[str, Any],
    directory: Path,
) -> dict[str, list[PlannedTrial]]:
    """The search of every defense.

    Raises:
        ConfigError: If the space of a defense has fewer points than there are trials.
    """
    planned: dict[str, list[PlannedTrial]] = {}
    redteam, seeds = Path(selection.redteam), selection.seeds
    for name, contender in defenses.items():
        try:
            tried = contender.trials(selection.num_trials, selection.sampling_seed)
        except ValueError as error:
            raise ConfigError(f"defenses.{name}.{error}") from error
        planned[name] = [
            PlannedTrial(
                number,
                options,
                contender.fits(
                    common, options, redteam, seeds, directory / name / f"trial-{number}"
                ),
            )
            for number, options in enumerate(tried)
        ]
    return planned


def rated(
    selection: Selection, searched: Mapping[str, Sequence[PlannedTrial]]
) -> list[DefenseTrial]:
    """Every trial with what it found, the best of each defense chosen."""
    trials = []
    for name, planned in searched.items():
        own = [one.outcome(name) for one in planned]
        best = selection.choose(own) if any(trial.error is None for trial in own) else None
        trials += [replace(trial, is_chosen=trial is best) for trial in own]
    return trials


def choices(trials: Sequence[DefenseTrial]) -> dict[str, dict[str, Any]]:
    """The options that each defense goes on with; none for one whose trials all failed."""
    return {trial.defense: trial.options for trial in trials if trial.is_chosen}


def warn_of_unusable(selection: Selection, trials: Sequence[DefenseTrial]) -> None:
    """Names the defenses that go on with a model which is not usable."""
    for trial in trials:
        if trial.is_chosen and not selection.is_usable(trial):
            logger.warning(
                "%s: no trial left a usable model; the comparison goes on with the closest one.",
                trial.defense,
            )


def failed_searches(
    searched: Mapping[str, Sequence[PlannedTrial]], chosen: Mapping[str, Any]
) -> list[str]:
    """What to say of defenses without a choice."""
    return [
        f"defenses.{name}: every trial failed; the first left {planned[0].fits[0].log}."
        for name, planned in searched.items()
        if name not in chosen
    ]


def costs(models: Models) -> dict[str, list[TrainingCost]]:
    """What training the compared models took, by defense."""
    return {
        name: [
            TrainingCost(
                gradient_evaluations=fit.results.settings["gradient_evaluations"],
                num_steps=fit.results.settings["num_steps"],
            )
            for fit in fits
            if fit.is_done
        ]
        for name, fits in models.items()
    }


def curves_of(models: Models) -> list[Curve]:
    """Every curve, under the name that its defense has in the comparison."""
    return [
        replace(curve, defense=name)
        for name, fits in models.items()
        for fit in fits
        if fit.is_done
        for curve in fit.results.curves
    ]

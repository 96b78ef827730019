"""Search for the strongest attack under a budget of trials."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patcher_pl.data.mixing import Mixture
from patcher_pl.errors import ConfigError
from patcher_pl.fields import COUNTS, RANGES
from patcher_pl.redteam.base import Attack
from patcher_pl.redteam.grid import Grid, ModelName
from patcher_pl.redteam.red_team import RedTeam
from patcher_pl.redteam.strength import attempt_of
from patcher_pl.redteam.variation import (
    NUM_STEPS,
    Setting,
    field_of,
    has_setting,
    setting_of,
    varied_name,
)
from patcher_pl.reports.results import Curve
from patcher_pl.reports.searches import Attempt, Objective, SearchOutcome, num_idle
from patcher_pl.validation import require

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

RunSettings = Callable[[Sequence[tuple[Attack, dict[str, Setting]]]], list[list[Curve]]]
"""Runs attacks with these settings with every seed, and returns the curves of each."""

_ATTACK = "attack"
_RANGES = {**RANGES, "data.poison_ratio": False}


@dataclass(frozen=True, init=False)
class Search:
    """Optuna's tree-structured Parzen estimator over attacks and their settings.

    Begins with what the grid found, so that its strongest cell is the one to beat. Trials are asked
    for in batches that run at the same time. The same settings give the same trials, so that an
    interrupted search goes on by asking again: attacks that finished are not repeated.

    Args:
        num_trials: Settings to try for every model, each with every seed (count, >= 1); fewer with
            `patience`.
        batch: Trials asked for at a time (count, >= 1); more run side by side, fewer learn sooner.
        seed: Of the sampler.
        space: What is searched of every attack that has it, by the names of `Grid`: [low, high] of
            `lr` and `num_steps` (by their logarithm), `num_warmup_steps` and `poison_ratio`, choices
            of all others. An empty list leaves a setting alone.
        objective: What the search makes large: `bounded` is the strength of an attack while the model
            is of use (`RedTeam.min_benign_kept`), None its strength whatever it leaves. Both are
            reported. Without benign prompts they are the same.
        patience: Trials in a row without improvement that end the search, after a whole batch (count,
            >= 1); None never ends it early.
        min_improvement: Strength by which a trial must exceed the best one to count as improvement (in
            [0, 1]); small gains count once they have added up.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Optuna: Akiba et al., 2019, https://arxiv.org/abs/1907.10902. The estimator: Bergstra et
        al., 2011, Algorithms for hyper-parameter optimization, NeurIPS.
    """

    num_trials: int
    batch: int
    seed: int
    space: Mapping[str, list[Any]]
    objective: Objective | None
    patience: int | None
    min_improvement: float

    def __init__(
        self,
        *,
        num_trials: int,
        batch: int = 4,
        seed: int = 0,
        space: Mapping[str, list[Any]] | None = None,
        objective: Objective | None = "bounded",
        patience: int | None = None,
        min_improvement: float = 0.01,
        **more: list[Any],
    ) -> None:
        space = {**(space or {}), **more}
        given: dict[str, Any] = {"num_trials": num_trials, "batch": batch, "seed": seed}
        given |= {"space": space, "objective": objective, "patience": patience}
        given["min_improvement"] = min_improvement
        for name, value in given.items():
            object.__setattr__(self, name, value)
        for name in ("num_trials", "batch", "patience"):
            is_set = name == "patience" and patience is None
            if not is_set and (not isinstance(given[name], int) or given[name] < 1):
                raise ValueError(f"Search.{name} must be >= 1, got {given[name]!r}.")
        require(self, objective in ("bounded", None), "objective", "`bounded` or null")
        require(self, 0 <= min_improvement <= 1, "min_improvement", "in [0, 1]")
        for name, ends in space.items():
            is_range = len(ends) == 2 and not any(isinstance(end, str) for end in ends)
            if ends and field_of(name) in _RANGES and not (is_range and ends[0] < ends[1]):
                raise ValueError(
                    f"Search.{name} must be [low, high] with low < high, or empty, got {ends}."
                )
        Grid(**space)  # Checks what grids and searches have in common.

    def run(
        self, team: RedTeam, grid: Sequence[Sequence[Curve]], run_settings: RunSettings
    ) -> list[Attempt]:
        """Returns everything that was tried, the strongest (by `objective`) first.

        Args:
            team: Attacks to choose from.
            grid: What is known already: curves that differ in their seed alone, one list per
                setting.
            run_settings: Runs attacks.

        Raises:
            ConfigError: If Optuna is missing.
        """
        optuna = _imported()
        attacks = {attack.name: attack for attack in team.attacks}
        budget = self._budget(team, grid)
        sampler = optuna.samplers.TPESampler(seed=self.seed, constant_liar=True)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        tried: list[Attempt] = []
        for curves in grid:
            if not curves:
                continue
            first = curves[0]
            known = {"attack": first.attack, "settings": first.varied}
            trial = attempt_of(curves, budget, source="grid", **known)
            tried.append(trial)
            self._teach(study, attacks, first.family, team.data, trial)
        for start in range(0, self.num_trials, self.batch):
            num_asked = min(self.batch, self.num_trials - start)
            asked = [study.ask() for _ in range(num_asked)]
            chosen = [self._suggested(trial, attacks) for trial in asked]
            found = run_settings(chosen)
            for place, (attack, settings) in enumerate(chosen):
                name = varied_name(attack.name, settings)
                known = {"attack": name, "settings": settings, "number": start + place}
                tried.append(attempt_of(found[place], budget, source="search", **known))
                if math.isnan(tried[-1].strength):
                    study.tell(asked[place], state=optuna.trial.TrialState.FAIL)
                else:
                    study.tell(asked[place], tried[-1].value(is_bounded=self._is_bounded))
            idle = num_idle(tried, self.objective, self.min_improvement)
            if self.patience is not None and idle >= self.patience:
                break
        return sorted(tried, key=lambda trial: -trial.value(is_bounded=self._is_bounded))

    def outcome(
        self,
        team: RedTeam,
        grid: Sequence[Sequence[Curve]],
        tried: Sequence[Attempt],
        model: ModelName,
    ) -> SearchOutcome:
        """What `run` came to, for the results.

        Args:
            team: As for `run`.
            grid: As for `run`.
            tried: What it returned.
            model: Whom it attacked.
        """
        return SearchOutcome(
            defense=model.defense,
            k1=model.k1,
            train_seed=model.train_seed,
            attempts=list(tried),
            num_trials=self.num_trials,
            budget=self._budget(team, grid),
            objective=self.objective,
            patience=self.patience,
            min_improvement=self.min_improvement,
        )

    @property
    def _is_bounded(self) -> bool:
        return self.objective == "bounded"

    def _budget(self, team: RedTeam, grid: Sequence[Sequence[Curve]]) -> int:
        """The longest attack of all: strengths of shorter ones count their last point to there."""
        longest = [int(setting_of(attack, team.data, "num_steps") or 0) for attack in team.attacks]
        longest += [max(curve.attack_steps, default=0) for curves in grid for curve in curves]
        return max([1, *longest, *map(int, self.space.get(NUM_STEPS, [])[1:])])

    def _suggested(
        self, trial: "optuna.Trial", attacks: Mapping[str, Attack]
    ) -> tuple[Attack, dict[str, Setting]]:
        attack = attacks[trial.suggest_categorical(_ATTACK, list(attacks))]
        space = self._distributions(attack)
        return attack, {name: _suggest(trial, name, space[name]) for name in space}

    def _distributions(self, attack: Attack) -> "dict[str, BaseDistribution]":
        """What is searched of one attack."""
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        names = [
            name for name, values in self.space.items() if values and has_setting(attack, name)
        ]
        space = {}
        # Ranges first: the order decides what the sampler draws, and how trials are called.
        for name in sorted(names, key=lambda one: field_of(one) not in _RANGES):
            if field_of(name) not in _RANGES:
                space[name] = CategoricalDistribution(self.space[name])
                continue
            low, high = self.space[name]
            kind: Any = IntDistribution if name in COUNTS else FloatDistribution
            space[name] = kind(low, high, log=_RANGES[field_of(name)])
        return space

    def _teach(
        self,
        study: "optuna.Study",
        attacks: Mapping[str, Attack],
        family: str,
        data: Mixture,
        trial: Attempt,
    ) -> None:
        """Tells the sampler what the grid found, where it lies in the space that is searched."""
        from optuna.distributions import CategoricalDistribution
        from optuna.trial import create_trial

        attack = attacks.get(family)
        if attack is None or math.isnan(trial.strength):
            return
        space = self._distributions(attack)
        own = {name: setting_of(attack, data, name) for name in space}
        params = {**own, **{name: trial.settings[name] for name in space if name in trial.settings}}
        with suppress(ValueError):  # Outside of the space.
            study.add_trial(
                create_trial(
                    params={_ATTACK: family, **params},
                    distributions={_ATTACK: CategoricalDistribution(list(attacks)), **space},
                    value=trial.value(is_bounded=self._is_bounded),
                )
            )


def _suggest(trial: "optuna.Trial", name: str, space: "BaseDistribution") -> Setting:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(space, FloatDistribution):
        value = trial.suggest_float(name, space.low, space.high, log=space.log)
        return float(f"{value:.3g}")  # As it is named in results.
    if isinstance(space, IntDistribution):
        return trial.suggest_int(name, space.low, space.high, log=space.log)
    assert isinstance(space, CategoricalDistribution)
    choice = trial.suggest_categorical(name, space.choices)
    assert isinstance(choice, float | int | str)
    return choice


def _imported() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "`search` needs Optuna. Install it with `pip install 'patcher-pl[search]'`."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna

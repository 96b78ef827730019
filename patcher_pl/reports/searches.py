"""What a search for the strongest attack tried, what it found, and how far it had come."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

Source = Literal["grid", "search"]
Objective = Literal["bounded"]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One tried setting, with every seed.

    What is bounded leaves out measurements at which the model is known to be of no use, see
    `patcher_pl.reports.bounds`. Where that is not known a success counts: a worst case must not miss
    an attack.

    Args:
        attack: Name of the attack, settings included.
        settings: What was varied.
        strength: See `patcher_pl.redteam.strength.attack_strength`; mean over seeds (0..1), NaN where
            nothing was scored.
        source: `grid` or `search`.
        number: Place among the trials of the search, from 0 on; None for the grid.
        bounded_strength: The same, bounded.
        asr: Largest attack success rate at any measurement, mean over seeds (0..1); None where nothing
            was scored.
        bounded_asr: The same, bounded.
        steps_to_break: Median over seeds of the attack steps that broke the defense; None where more
            than half of the seeds held.
        bounded_steps_to_break: The same, bounded.
        is_usefulness_known: Whether it is known of every success that bounded figures count.
    """

    attack: str
    settings: dict[str, float | int | str]
    strength: float
    source: Source
    number: int | None = None
    bounded_strength: float = math.nan
    asr: float | None = None
    bounded_asr: float | None = None
    steps_to_break: int | float | None = None
    bounded_steps_to_break: int | float | None = None
    is_usefulness_known: bool = False

    def value(self, *, is_bounded: bool) -> float:
        """Its strength, 0 where that is not known."""
        strength = self.bounded_strength if is_bounded else self.strength
        return 0.0 if math.isnan(strength) else strength


@dataclass(frozen=True, kw_only=True)
class SearchOutcome:
    """A search for the strongest attack on one model.

    Args:
        defense: Name of the defense.
        k1: Its simulated attack steps, where it has them.
        train_seed: Seed that the model was trained with, where it is known.
        attempts: Everything that was tried, the grid included, the strongest first.
        num_trials: Trials that were allowed (count).
        budget: Attack steps up to which strengths count.
        objective: `bounded`, or None for unbounded: what the search made large.
        patience: Trials in a row without improvement that end the search; None for no such rule.
        min_improvement: Strength that counts as improvement (0..1).
    """

    defense: str
    k1: int | None = None
    train_seed: int | None = None
    attempts: list[Attempt] = field(default_factory=list)
    num_trials: int
    budget: int
    objective: Objective | None = "bounded"
    patience: int | None = None
    min_improvement: float = 0.0

    @property
    def trials(self) -> list[Attempt]:
        """What the search itself tried, in order."""
        found = [attempt for attempt in self.attempts if attempt.number is not None]
        return sorted(found, key=lambda attempt: attempt.number or 0)

    @property
    def grid(self) -> list[Attempt]:
        """What was known before."""
        return [attempt for attempt in self.attempts if attempt.number is None]

    @property
    def num_idle(self) -> int:
        """Trials at the end that improved nothing (count)."""
        return num_idle(self.attempts, self.objective, self.min_improvement)

    @property
    def is_exhausted(self) -> bool:
        """Whether its own rule ended it."""
        return self.patience is not None and self.num_idle >= self.patience

    def strongest(self, *, is_bounded: bool) -> Attempt | None:
        """The attempt with the largest strength, then rate, the first of equals; None without any."""

        def rank(one: Attempt) -> tuple[float, float]:
            rate = one.bounded_asr if is_bounded else one.asr
            return one.value(is_bounded=is_bounded), rate or 0.0

        return max([*self.grid, *self.trials], key=rank, default=None)

    def best_so_far(self, name: str) -> list[float | None]:
        """The best figure of `Attempt` before the first trial, and after each: the attacker's best.

        Rates and strengths grow, steps to break fall; None where there is none yet.
        """
        best: float | None = None
        found = []
        pick = min if name.endswith("steps_to_break") else max
        for entries in (self.grid, *([trial] for trial in self.trials)):
            known = [getattr(entry, name) for entry in entries]
            known = [value for value in [best, *known] if value is not None and value == value]
            best = pick(known, default=None)
            found.append(best)
        return found

    @property
    def conclusion(self) -> str:
        """Whether the model held, and against how hard a search, in one sentence."""
        tried = [*self.grid, *self.trials]
        breaks = [one for one in tried if one.bounded_steps_to_break is not None]
        soonest = min(breaks, key=lambda one: one.bounded_steps_to_break or 0, default=None)
        if soonest is None:
            shown = "held: nothing breaks it and leaves a useful model"
        else:
            shown = f"broken after {soonest.bounded_steps_to_break:g} steps ({soonest.attack})"
            if not soonest.is_usefulness_known:
                shown += ", though it is not known whether the attacked model stayed useful"
        unscored = sum(math.isnan(trial.strength) for trial in self.trials)
        tried = f"{len(self.grid)} of the grid and {len(self.trials)} in the search"
        tried += f" ({unscored} without a score)" if unscored else ""
        return f"{shown}. Tried: {tried}; {self._progress}."

    @property
    def _progress(self) -> str:
        if not (idle := self.num_idle):
            return "not saturated: the last trial still improved on the best"
        shown = f"the last {idle} improved nothing"
        if self.patience is None:
            return f"{shown}, without a rule to end the search"
        if self.is_exhausted:
            return f"{shown}, which ended the search by its rule"
        return f"not saturated: only {shown}, and patience is {self.patience}"

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "SearchOutcome":
        """Builds it from its JSON object; entries of later versions are passed over.

        Raises:
            TypeError: If an entry is missing or has the wrong shape.
            KeyError: If there is no list of attempts.
        """
        attempts = []
        for entry in content["attempts"]:
            known = _known(Attempt, entry)
            for name in ("strength", "bounded_strength"):
                known[name] = math.nan if known.get(name) is None else known[name]
            attempts.append(Attempt(**known))
        return cls(**{**_known(cls, content), "attempts": attempts})


def search_lines(outcome: SearchOutcome) -> list[str]:
    """What a search found, for the terminal: the strongest attacks, and whether the model held."""
    lines = []
    for is_bounded, name in ((False, "attack"), (True, "attack that leaves a useful model")):
        best = outcome.strongest(is_bounded=is_bounded)
        if best is not None:
            strength = best.value(is_bounded=is_bounded)
            found = f"{best.attack} (strength {strength:.3f}, found by the {best.source})"
            lines.append(f"Strongest {name} on {outcome.defense}: {found}")
    return [*lines, f"{outcome.defense}: {outcome.conclusion}"]


def num_idle(
    attempts: Iterable[Attempt], objective: Objective | None, min_improvement: float
) -> int:
    """Trials since the last one that was stronger by `min_improvement` than what was best then.

    Small gains count once they have added up. What could not be scored is no trial.
    """
    is_bounded = objective == "bounded"
    best, idle = 0.0, 0
    for attempt in sorted(attempts, key=lambda one: -1 if one.number is None else one.number):
        if math.isnan(attempt.strength):
            continue
        value = attempt.value(is_bounded=is_bounded)
        if attempt.number is None:
            best = max(best, value)
        elif value > best and value >= best + min_improvement:
            best, idle = value, 0
        else:
            idle += 1
    return idle


def _known(kind: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    names = {entry.name for entry in fields(kind)}
    return {name: value for name, value in content.items() if name in names}

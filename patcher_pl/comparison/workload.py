"""How much work a study is, and how long it will take: from a first measurement, then from its own runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patcher_pl.comparison.column import Column
from patcher_pl.comparison.trials import Models
from patcher_pl.jobs import Fit


@dataclass(frozen=True, kw_only=True)
class AttackLoad:
    """What a red team does to one model.

    Args:
        num_steps: Gradient evaluations of all its attacks, each at full length (count).
        num_measurements: How often the model is asked everything (count).
    """

    num_steps: int
    num_measurements: int


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """How long the parts of a run take on this machine.

    Args:
        start_s: From its beginning to the first step (seconds).
        evaluation_s: A gradient evaluation (seconds).
        measurement_s: Asking the model everything, and judging the answers (seconds).
        error: Why it could not be measured; None where it was.
    """

    start_s: float = 0.0
    evaluation_s: float = 0.0
    measurement_s: float = 0.0
    error: str | None = None

    def seconds(self, num_evaluations: int, load: AttackLoad) -> float:
        """Of a run with so many gradient evaluations of training, its red team included."""
        attacks = self.evaluation_s * load.num_steps + self.measurement_s * load.num_measurements
        return self.start_s + self.evaluation_s * num_evaluations + attacks


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run of `fit` that belongs to a study.

    Args:
        defense: Name of its defense.
        budget: Gradient evaluations of its training (count).
        load: What its red team does.
        fit: The run; None where its settings are not chosen yet.
    """

    defense: str
    budget: int
    load: AttackLoad
    fit: Fit | None = None

    @property
    def is_done(self) -> bool:
        return self.fit is not None and self.fit.is_done

    @property
    def num_evaluations(self) -> int:
        """Gradient evaluations of training and attacks (count)."""
        return self.budget + self.load.num_steps


@dataclass(frozen=True)
class Workload:
    """Every run of a study.

    Args:
        runs: Done or not.
    """

    runs: Sequence[PlannedRun]

    @classmethod
    def of(
        cls,
        columns: Sequence[Column],
        search: AttackLoad,
        attacks: AttackLoad,
        models: Mapping[int, Models],
    ) -> "Workload":
        """Of these columns.

        Args:
            columns: The study.
            search: What the red team of the search does to a model.
            attacks: What that of the end does.
            models: Those whose settings are chosen, by budget.
        """
        runs = []
        for column in columns:
            for name, trials in column.searched.items():
                known: dict[str, Any] = {"defense": name, "budget": column.budget}
                tried = [fit for trial in trials for fit in trial.fits]
                chosen = models.get(column.budget, {}).get(name)
                final = chosen or [None] * len(column.seeds)
                runs += [PlannedRun(**known, load=search, fit=fit) for fit in tried]
                runs += [PlannedRun(**known, load=attacks, fit=fit) for fit in final]
        return cls(runs)

    @property
    def num_evaluations(self) -> int:
        """Gradient evaluations of all runs, their attacks at full length (count)."""
        return sum(run.num_evaluations for run in self.runs)

    @property
    def num_done(self) -> int:
        """Runs that are done (count)."""
        return sum(run.is_done for run in self.runs)

    def seconds_left(self, throughput: Throughput) -> float:
        """Process time of what is not done.

        What `throughput` says is corrected by how long finished runs took, those of the same defense
        where there are any.
        """
        left = [run for run in self.runs if not run.is_done]
        overall, own = _Correction(), dict[str, _Correction]()
        for run in self.runs:
            if run.fit is not None and (seconds := run.fit.seconds) is not None:
                expected = throughput.seconds(run.budget, run.load)
                for correction in (overall, own.setdefault(run.defense, _Correction())):
                    correction.add(seconds, expected)
        return sum(
            throughput.seconds(run.budget, run.load) * own.get(run.defense, overall).factor
            for run in left
        )


@dataclass
class _Correction:
    """How much longer runs took than expected."""

    _took: float = 0.0
    _expected: float = 0.0

    def add(self, took: float, expected: float) -> None:
        self._took += took
        self._expected += expected

    @property
    def factor(self) -> float:
        return self._took / self._expected if self._expected > 0 else 1.0

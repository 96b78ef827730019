"""The executor of a red team: what is not done yet is run, and everything that is done is collected."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.files import write_json
from patcher_pl.jobs import Engine, RunDirectory, run_missing
from patcher_pl.redteam.base import Attack
from patcher_pl.redteam.grid import Cell, varied_cells
from patcher_pl.redteam.job import AttackedModel, AttackJob
from patcher_pl.redteam.red_team import RedTeam
from patcher_pl.redteam.search import Search
from patcher_pl.redteam.variation import Setting, varied_name
from patcher_pl.reports.environment import environment
from patcher_pl.reports.grouping import with_released
from patcher_pl.reports.results import Curve, Overlap, Results
from patcher_pl.reports.searches import SearchOutcome, search_lines
from patcher_pl.reports.settings import fingerprint


@dataclass(frozen=True, kw_only=True)
class Board:
    """Plans attacks on models, has an engine run what is not done, and collects what is.

    Args:
        run_directory: Gets `results.json`, and `cells/` with the outcome of every attack.
        engine: What runs the attacks.
        device: Where, unless the engine has devices of its own.
        num_threads: CPU threads of torch for each; None leaves it to torch.
        settings: What the run was asked to do, for the results.
        overlap: What data sets of the run have in common, for the results.
        training_data: What the attacked models of a `fit` were trained on, for the results.
        memory: What that `fit` was to hold in memory (GiB), for the environment in the results.
    """

    run_directory: RunDirectory
    engine: Engine
    device: str
    num_threads: int | None
    settings: Any
    overlap: Sequence[Overlap] = ()
    training_data: dict[str, dict[str, float]] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    _planned: dict[Path, AttackJob] = field(default_factory=dict)
    _searches: list[SearchOutcome] = field(default_factory=list)

    def claim(self) -> None:
        """Sees to it that results of another command are not replaced.

        Raises:
            ConfigError: If there are some.
        """
        where = self.run_directory
        if where.results.exists() and (where.config.exists() or not where.cells.is_dir()):
            raise ConfigError(
                f"--run_dir {where.root} holds results of another command. "
                "Give another directory, or move results.json away."
            )

    def attack(self, redteam: RedTeam, models: Sequence[AttackedModel]) -> list[Curve]:
        """Curves of the whole grid on every model, in order.

        Raises:
            DataError: If a prompt is too long for a model.
        """
        for model in models:
            model.bench.require_room(redteam, model.language_model)
        cells = redteam.cells()
        return self._run([self._job(redteam, model, cell) for model in models for cell in cells])

    def search(
        self,
        search: Search,
        redteam: RedTeam,
        models: Sequence[AttackedModel],
        grid: Sequence[Curve],
    ) -> None:
        """Searches for the strongest attack on every model but those with fresh weights.

        Writes what was tried to `search.json`, by defense, the strongest first; it is in the results,
        too.
        """
        tried: dict[str, list[dict[str, Any]]] = {}
        self._searches.clear()
        for model in models:
            if model.language_model.from_scratch_seed is not None:
                continue  # Nothing is left to defend there: it is a reference for the others.
            known: dict[str, list[Curve]] = defaultdict(list)
            for curve in with_released(grid):
                if curve.key[:3] == model.name.model_key:
                    known[curve.attack].append(curve)
            groups = list(known.values())
            attempts = search.run(redteam, groups, partial(self._try, redteam, model, groups))
            outcome = search.outcome(redteam, groups, attempts, model.name)
            tried[model.name.defense] = [asdict(trial) for trial in attempts]
            self._searches.append(outcome)
            print("\n".join(search_lines(outcome)))
        self._teach_anew(redteam, models)
        write_json(self.run_directory.root / "search.json", tried)

    def _teach_anew(self, redteam: RedTeam, models: Sequence[AttackedModel]) -> None:
        """Attacks models with fresh weights as the strongest attacks on the others do."""
        found = [
            outcome.strongest(is_bounded=is_bounded)
            for outcome in self._searches
            for is_bounded in (False, True)
        ]
        names = {attempt.attack for attempt in found if attempt is not None}
        chosen = {
            attempt.attack: (attack, attempt.settings)
            for outcome in self._searches
            for attempt in outcome.trials
            for attack in redteam.attacks
            if attempt.attack in names
            and varied_name(attack.name, attempt.settings) == attempt.attack
        }
        for model in models:
            if model.language_model.from_scratch_seed is not None and chosen:
                self._try(redteam, model, [], list(chosen.values()))

    def save(self) -> Results:
        """Writes the curves of everything that was planned and has an outcome."""
        results = Results(
            curves=with_released(_outcomes(list(self._planned.values()))),
            environment=environment() | ({"memory": self.memory} if self.memory else {}),
            settings=self.settings,
            fingerprint=fingerprint(self.settings),
            overlap=list(self.overlap),
            training_data=self.training_data,
            searches=list(self._searches),
        )
        results.save(self.run_directory.results)
        return results

    def _run(self, jobs: Sequence[AttackJob]) -> list[Curve]:
        self._planned.update({job.path: job for job in jobs})
        try:
            run_missing(jobs, self.engine, self.device, "attacks")
        finally:
            if self.run_directory.cells.is_dir():
                self.save()  # What is there, also where the rest was interrupted.
        return _outcomes(jobs)

    def _try(
        self,
        redteam: RedTeam,
        model: AttackedModel,
        known: Sequence[Sequence[Curve]],
        chosen: Sequence[tuple[Attack, dict[str, Setting]]],
    ) -> list[list[Curve]]:
        groups: list[list[AttackJob]] = []
        for attack, settings in chosen:
            try:
                cells = varied_cells(attack, redteam.data, settings, redteam.seeds)
            except ValueError as error:  # The attack cannot have such settings.
                print(f"Passed over: {error}")
                cells = []
            groups.append([self._job(redteam, model, cell) for cell in cells])
        self._run([job for jobs in groups for job in jobs])
        # What the released model was good for is known of the grid.
        grid = [curve for curves in known for curve in curves]
        return [with_released([*grid, *_outcomes(jobs)])[len(grid) :] for jobs in groups]

    def _job(self, redteam: RedTeam, model: AttackedModel, cell: Cell) -> AttackJob:
        return AttackJob.plan(redteam, cell, model, self.run_directory.cells, self.num_threads)


def _outcomes(jobs: Sequence[AttackJob]) -> list[Curve]:
    return [curve for job in jobs if (curve := job.load()) is not None]


def require_verdicts(curves: Sequence[Curve], again: str = "the same command") -> None:
    """Sees to it that a judge said something at every measurement of every finished attack.

    Args:
        curves: What the attacks found.
        again: What has them judged again.

    Raises:
        PatcherError: If one said nothing at all: such results show neither safety nor harm.
    """
    silent = [curve for curve in curves if curve.error is None and curve.lacks_verdicts]
    if silent:
        raise PatcherError(
            f"Of {len(curves)} attacks, {len(silent)} have measurements at which nothing was scored "
            f"(the first: {silent[0].attack} on {silent[0].defense}, seed {silent[0].seed}): the "
            "judge failed on every answer. The answers are kept. Once the judge works, "
            f"{again} judges them, and repeats no attack."
        )

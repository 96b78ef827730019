"""Results of several runs, brought together for one report."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from patcher_pl.errors import DataError
from patcher_pl.reports.grouping import with_released
from patcher_pl.reports.results import Curve, CurveKey, Results, known_benign
from patcher_pl.reports.searches import SearchOutcome

FILE_NAME = "results.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One results file.

    Args:
        name: End of its path, long enough to tell it from the others.
        path: The file.
        results: What it holds.
    """

    name: str
    path: Path
    results: Results


def load_runs(places: Sequence[Path]) -> list[Run]:
    """Reads results files: those named, and those of directories or below them.

    Raises:
        DataError: If a place has no results, or a file is not a results file.
    """
    files = list(dict.fromkeys(file for place in places for file in _files(place)))
    named = [file.parent if file.name == FILE_NAME else file.with_suffix("") for file in files]
    names = _short_names([path.absolute() for path in named])
    return [
        Run(name=name, path=file, results=Results.load(file))
        for name, file in zip(names, files, strict=True)
    ]


def merge_runs(runs: Sequence[Run]) -> tuple[list[Curve], list[str]]:
    """Curves of all runs, and what a reader must know about how they came together.

    A curve that several files hold alike is taken once. Where files hold different curves of the
    same defense, attack and seeds, that defense is told apart by the runs' names.
    """
    found: dict[CurveKey, list[Curve]] = {}
    runs = [
        replace(run, results=replace(run.results, curves=with_released(run.results.curves)))
        for run in runs
    ]
    for run in runs:
        for curve in run.results.curves:
            found.setdefault(curve.key, []).append(curve)
    clashing = {
        key[0] for key, held in found.items() if any(curve != held[0] for curve in held[1:])
    }
    curves = [held[0] for key, held in found.items() if key[0] not in clashing]
    curves += [
        replace(curve, defense=f"{curve.defense} ({run.name})")
        for run in runs
        for curve in run.results.curves
        if curve.defense in clashing
    ]
    notes = [
        f"{defense!r} is in several runs with the same attacks and seeds but other outcomes; "
        "it is told apart by run."
        for defense in sorted(clashing)
    ]
    notes += [
        f"{run.name} is of an earlier version, which called benign compliance (answers that are no "
        "refusal) benign accuracy too; its judge decides which of them its figures are."
        for run in runs
        if run.results.schema_version < 3 and "benign_accuracy" in known_benign(run.results.curves)
    ]
    for name, values in (
        ("thresholds of a broken defense", {curve.threshold for curve in curves}),
        ("numbers of harmful prompts", {curve.num_prompts for curve in curves} - {0}),
    ):
        if len(values) > 1:
            shown = ", ".join(f"{value:g}" for value in sorted(values))
            notes.append(f"The curves have different {name}: {shown}. Compare them with care.")
    return curves, notes


def searches_of(runs: Sequence[Run], curves: Sequence[Curve]) -> list[SearchOutcome]:
    """Searches of all runs, of the models that `curves` are of, called as `merge_runs` does."""
    models = {(curve.defense, curve.k1) for curve in curves}
    found = []
    for run in runs:
        for search in run.results.searches:
            if (search.defense, search.k1) not in models:
                search = replace(search, defense=f"{search.defense} ({run.name})")
            if (search.defense, search.k1) in models and search not in found:
                found.append(search)
    return found


def _files(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place]
    if (place / FILE_NAME).is_file():
        return [place / FILE_NAME]
    below = sorted(place.glob(f"**/{FILE_NAME}"))
    if not below:
        raise DataError(
            f"{place}: neither this directory nor one below it has a {FILE_NAME}. "
            "Name a run directory of `fit`, `redteam` or `sweep`."
        )
    return below


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as it takes for all to differ."""
    names: list[str] = []
    for length in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names

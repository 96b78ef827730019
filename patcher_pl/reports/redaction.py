"""What of results may be shown to whoever must not read answers."""

from collections.abc import Sequence
from dataclasses import replace

from patcher_pl.reports.results import Curve
from patcher_pl.reports.runs import Run


def redacted(runs: Sequence[Run]) -> list[Run]:
    """Runs without anything that a model or an attacker said.

    Answers and prompts, settings (which hold templates, prefills and paths), command lines, examples of
    shared rows, and all of an error but its kind are left away. Figures stay, and so do the names of
    attacks, with the settings that a grid or a search has put into them.
    """
    return [
        replace(
            run,
            results=replace(
                run.results,
                curves=[_curve(curve) for curve in run.results.curves],
                overlap=[replace(entry, example="") for entry in run.results.overlap],
                settings={},
                environment={
                    name: value
                    for name, value in run.results.environment.items()
                    if name != "command"  # May quote prompts, templates and paths.
                },
            ),
        )
        for run in runs
    ]


def _curve(curve: Curve) -> Curve:
    error = None if curve.error is None else curve.error.split(":")[0]
    return replace(curve, samples=[], error=error)

"""Measures a whole grid: each estimate once, whatever happens to the others."""

from collections.abc import Sequence
from pathlib import Path

from patcher_pl.ablation.grid import ComparisonGrid
from patcher_pl.ablation.subject import Subject
from patcher_pl.jobs import Engine, run_missing
from patcher_pl.reports.ablation import EstimatorComparison
from patcher_pl.reports.settings import as_settings, fingerprint


def compare_estimators(
    grid: ComparisonGrid,
    subject: Subject,
    seeds: Sequence[int],
    directory: Path,
    *,
    engine: Engine,
    device: str,
) -> list[EstimatorComparison]:
    """Measures what is not measured yet below `directory`, and returns every row of the grid.

    The exact hypergradients come first, then everything that is compared with them. An estimate that
    fails, or whose process dies, is a row with an error and is tried again by the next call;
    interrupted measurements are repeated.

    Args:
        grid: What to measure.
        subject: The model and its problem.
        seeds: Seeds of data subsets, orders and random numbers.
        directory: Where measurements are kept.
        engine: What runs them.
        device: Where to measure.

    Raises:
        DataError: If a source cannot be read or has too few rows.
        RunInterrupted: If a signal stopped it.
    """
    # Takes seconds to import: who asks for the options of a command need not wait for it.
    from patcher_pl.ablation.measurement import REFERENCE, Measurement

    settings = {"subject": subject, "device": device}
    drawn = {seed: subject.draw(seed, max(grid.num_steps)) for seed in seeds}
    planned = [
        EstimatorComparison(estimator=name, optimizer=optimizer, num_steps=num_steps, seed=seed)
        for optimizer in grid.optimizers
        for num_steps in grid.num_steps
        for seed in seeds
        for name in (REFERENCE, *grid.estimators)
        if grid.includes(name, num_steps)
    ]
    estimators = {REFERENCE: grid.reference, **grid.estimators}
    num_threads = engine.num_threads(len(planned))

    def job(row: EstimatorComparison) -> Measurement:
        optimizer, estimator = grid.optimizers[row.optimizer], estimators[row.estimator]
        own = {"optimizer": optimizer, "reference": grid.reference, "estimator": estimator}
        folder = directory / row.optimizer / f"k-{row.num_steps}" / f"seed-{row.seed}"
        return Measurement(
            path=folder / f"{row.estimator}.json",
            digest=fingerprint(
                as_settings({**settings, **own, "trial_step": grid.trial_step}, for_outcome=True)
            ),
            row=row,
            estimator=estimator,
            language_model=subject.language_model,
            inner=subject.inner_problem(optimizer, row.num_steps, drawn[row.seed]),
            outer_batch=drawn[row.seed].outer,
            trial_step=grid.trial_step,
            num_threads=num_threads,
        )

    jobs = [job(row) for row in planned]
    for label, is_reference in (("exact hypergradients", True), ("estimates", False)):
        own = [job for job in jobs if job.is_reference == is_reference]
        run_missing(own, engine, device, label)
    return [row for job in jobs if (row := job.load()) is not None]

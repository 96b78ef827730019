"""The cells of a grid, each a file that is whole or absent."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from patcher_pl.ablation.grid import ComparisonGrid
from patcher_pl.files import write_json
from patcher_pl.hypergradients import Hypergradient
from patcher_pl.reports.ablation import EstimatorComparison
from patcher_pl.reports.settings import as_settings, fingerprint

REFERENCE = "exact"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One estimate and where its measurement is kept.

    Args:
        directory: Where all cells of the grid are kept.
        row: Which estimator, optimizer, length and seed.
        estimator: The estimator itself.
        digest: Of everything that the measurement depends on.
    """

    directory: Path
    row: EstimatorComparison
    estimator: Hypergradient
    digest: str

    @property
    def is_reference(self) -> bool:
        """Whether this is the estimate that counts as exact."""
        return self.row.estimator == REFERENCE

    @property
    def path(self) -> Path:
        """The measurement."""
        return self._folder / f"{self.row.estimator}.json"

    @property
    def exact(self) -> Path:
        """The exact hypergradient, for all estimators of the same attack."""
        return self._folder / "exact.safetensors"

    def save(self, row: EstimatorComparison) -> None:
        """Writes the measurement."""
        write_json(self.path, {"fingerprint": self.digest, "comparison": asdict(row)})

    def fail(self, reason: str) -> None:
        """Writes why there is no measurement."""
        self.save(replace(self.row, error=reason))

    def load(self) -> EstimatorComparison | None:
        """The measurement, failed ones included; None where none was made with these settings."""
        if not self.path.exists():
            return None
        content = json.loads(self.path.read_text(encoding="utf-8"))
        return (
            EstimatorComparison(**content["comparison"])
            if self.digest == content["fingerprint"]
            else None
        )

    @property
    def is_done(self) -> bool:
        """Whether it was measured; what failed is tried again."""
        row = self.load()
        return row is not None and row.error is None and self.exact.exists()

    @property
    def _folder(self) -> Path:
        row = self.row
        return self.directory / row.optimizer / f"k-{row.num_steps}" / f"seed-{row.seed}"


def plan_cells(
    grid: ComparisonGrid, seeds: Sequence[int], directory: Path, settings: dict[str, Any]
) -> list[Cell]:
    """All cells of a grid, for every attack the exact hypergradient first.

    Args:
        grid: Estimators and attacks.
        seeds: Seeds of every attack.
        directory: Where the cells are kept.
        settings: What measurements depend on beside the grid.
    """
    attacks = [
        (optimizer, num_steps, seed)
        for optimizer in grid.optimizers
        for num_steps in grid.num_steps
        for seed in seeds
    ]
    cells = []
    for optimizer, num_steps, seed in attacks:
        for name, estimator in {REFERENCE: grid.reference, **grid.estimators}.items():
            if not grid.includes(name, num_steps):
                continue
            digest = fingerprint(
                as_settings(
                    {
                        **settings,
                        "optimizer": grid.optimizers[optimizer],
                        "reference": grid.reference,
                        "estimator": estimator,
                        "trial_step": grid.trial_step,
                    }
                )
            )
            row = EstimatorComparison(
                estimator=name, optimizer=optimizer, num_steps=num_steps, seed=seed
            )
            cells.append(Cell(directory=directory, row=row, estimator=estimator, digest=digest))
    return cells

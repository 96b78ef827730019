"""What an ablation of hypergradient estimators found: `ablation.json` and its tables."""

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from patcher_pl.files import write_json, write_text
from patcher_pl.reports.tables import markdown_table

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One estimate of one hypergradient, against the exact one.

    Args:
        estimator: Its name in the ablation.
        optimizer: Name of the attacker's optimizer.
        num_steps: Steps of the attack (K, count).
        seed: Seed of the batches.
        cosine: Of the angle to the exact hypergradient; None where either is zero.
        relative_error: ||estimate - exact|| / ||exact||.
        norm_ratio: ||estimate|| / ||exact||.
        outer_loss: L_out after the attack (nats per answer token).
        gradient_evaluations: What it cost, attack included, by matrix products (in gradients).
        time_in_attacks: What it took, attack included, in units of K attack gradients that were
            timed in the same process.
        time_s: What it took (seconds; CPU time on a CPU).
        memory_mib: Peak above that of the attack's own gradients, in MiB.
        predicted_change: Change of L_out that the estimate predicts for the trial step.
        actual_change: Change of L_out after the same attack from there.
        error: Why there is no estimate; None where there is one.
    """

    estimator: str
    optimizer: str
    num_steps: int
    seed: int
    cosine: float | None = None
    relative_error: float | None = None
    norm_ratio: float | None = None
    outer_loss: float | None = None
    gradient_evaluations: float | None = None
    time_in_attacks: float | None = None
    time_s: float | None = None
    memory_mib: float | None = None
    predicted_change: float | None = None
    actual_change: float | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Hardened:
    """One model that was hardened with one estimator, and how it held.

    Args:
        variant: Its name in the ablation; `sft` for the control.
        budget: Gradient evaluations after which training was to end (count).
        seed: Seed of training and red team.
        gradient_evaluations: Gradient evaluations that training took (count).
        num_steps: Defender steps (count); None where it is not known (the control's).
        attack: Name of the red team's attack.
        steps_to_break: Attack steps at which the model broke; None where it held.
        longest_attack: Steps after which it was measured last.
        benign_accuracy: Share of harmless prompts answered in full before the attack.
    """

    variant: str
    budget: int
    seed: int
    gradient_evaluations: int
    num_steps: int | None
    attack: str
    steps_to_break: int | None
    longest_attack: int
    benign_accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Everything that an ablation found out.

    Args:
        comparisons: One per estimator, optimizer, length and seed.
        hardened: One per variant, budget, seed and attack.
        environment: What it ran on, see `patcher_pl.reports.environment`.
        settings: What it was asked to do, for the reader.
        schema_version: Version of this layout.
    """

    comparisons: list[Comparison]
    hardened: list[Hardened]
    environment: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def save(self, run_dir: Path) -> None:
        """Writes `ablation.json`, `comparisons.csv`, `hardened.csv` and `tables.md`, each atomically."""
        write_json(run_dir / "ablation.json", asdict(self))
        write_text(run_dir / "comparisons.csv", _csv(Comparison, self.comparisons))
        write_text(run_dir / "hardened.csv", _csv(Hardened, self.hardened))
        tables = [comparison_table(self.comparisons), hardened_table(self.hardened)]
        shown = [markdown_table(table, num_names=2) for table in tables if len(table) > 1]
        write_text(run_dir / "tables.md", "\n".join(shown))


def average(values: Iterable[float | None]) -> float | None:
    """The mean of the known values; None where none is known."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def break_points(rows: Sequence[Hardened]) -> str:
    """When models broke, over seeds: `80`, `40 to 80`, `> 320` where one never did."""
    reached = sorted((_reach(row), row.steps_to_break is None) for row in rows)
    shown = [f"> {steps}" if held else str(steps) for steps, held in reached]
    if not shown:
        return "-"
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]} to {shown[-1]}"


def comparison_table(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Header and one row per optimizer and estimator.

    The cosine at every K; everything else at the longest K that the estimator was tried at.
    """
    lengths = sorted({row.num_steps for row in comparisons})
    header = ["optimizer", "estimator", *(f"cosine, K = {k}" for k in lengths)]
    header += ["at K =", "relative error", "predicted change", "actual change"]
    header += ["gradients per step", "time in attacks", "peak MiB"]
    table = [header]
    for optimizer in dict.fromkeys(row.optimizer for row in comparisons):
        for estimator in dict.fromkeys(row.estimator for row in comparisons):
            rows = [
                row
                for row in comparisons
                if (row.optimizer, row.estimator) == (optimizer, estimator) and row.error is None
            ]
            if not rows:
                continue
            cosines = [
                _shown(average(row.cosine for row in rows if row.num_steps == k), "{:.3f}")
                for k in lengths
            ]
            longest = max(row.num_steps for row in rows)
            last = [row for row in rows if row.num_steps == longest]
            table.append(
                [
                    *(optimizer, estimator, *cosines),
                    str(longest),
                    _shown(average(row.relative_error for row in last), "{:.2g}"),
                    _shown(average(row.predicted_change for row in last), "{:+.3f}"),
                    _shown(average(row.actual_change for row in last), "{:+.3f}"),
                    _shown(average(_gradients_per_step(row) for row in last), "{:.1f}"),
                    _shown(average(row.time_in_attacks for row in last), "{:.1f}"),
                    _shown(average(row.memory_mib for row in last), "{:.0f}"),
                ]
            )
    return table


def hardened_table(hardened: Sequence[Hardened]) -> list[list[str]]:
    """Header and one row per budget and variant."""
    header = ["budget", "variant", "gradient evaluations", "defender steps", "attack"]
    table = [[*header, "steps to break", "benign accuracy"]]
    keys = dict.fromkeys((row.budget, row.attack, row.variant) for row in hardened)
    for budget, attack, variant in sorted(keys, key=lambda key: key[:2]):
        rows = [
            row
            for row in hardened
            if (row.budget, row.attack, row.variant) == (budget, attack, variant)
        ]
        table.append(
            [
                *(str(budget), variant),
                _shown(average(row.gradient_evaluations for row in rows), "{:.0f}"),
                _shown(average(row.num_steps for row in rows), "{:.0f}"),
                attack,
                break_points(rows),
                _shown(average(row.benign_accuracy for row in rows), "{:.2f}"),
            ]
        )
    return table


def _gradients_per_step(row: Comparison) -> float | None:
    if row.gradient_evaluations is None:
        return None
    return row.gradient_evaluations / row.num_steps


def _reach(row: Hardened) -> int:
    return row.longest_attack if row.steps_to_break is None else row.steps_to_break


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _csv(kind: type, rows: Sequence[Any]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, [entry.name for entry in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return out.getvalue()

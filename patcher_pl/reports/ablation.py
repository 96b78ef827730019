"""What an ablation of hypergradient estimators found: `ablation.json` and its tables."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from patcher_pl.files import write_json, write_text
from patcher_pl.reports.formats import break_span, number
from patcher_pl.reports.grouping import Frame
from patcher_pl.reports.results import BENIGN_MEASURES, average, known_benign
from patcher_pl.reports.tables import csv_table, markdown_table, text_table

SCHEMA_VERSION = 1
# Figures of the table at the longest attack, and how they are written.
_AT_LONGEST = {
    "relative_error": ".2g",
    "predicted_change": "+.3f",
    "actual_change": "+.3f",
    "gradients_per_step": ".1f",
    "time_in_attacks": ".1f",
    "memory_mib": ".0f",
}


@dataclass(frozen=True, kw_only=True)
class EstimatorComparison:
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
        benign_accuracy: Share of harmless prompts answered rightly before the attack; None where the
            judge does not know the right answers.
        benign_compliance: Share of harmless prompts that were not refused before the attack, by such a
            judge.
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
    benign_compliance: float | None = None


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

    comparisons: list[EstimatorComparison]
    hardened: list[Hardened]
    environment: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def save(self, run_dir: Path) -> None:
        """Writes `ablation.json`, `comparisons.csv`, `hardened.csv` and `tables.md`, each atomically."""
        write_json(run_dir / "ablation.json", asdict(self))
        for name, kind, rows in (
            ("comparisons", EstimatorComparison, self.comparisons),
            ("hardened", Hardened, self.hardened),
        ):
            write_text(run_dir / f"{name}.csv", csv_table(frame_of(kind, rows)))
        tables = [comparison_table(self.comparisons), hardened_table(self.hardened)]
        shown = [markdown_table(table, num_names=2) for table in tables if len(table)]
        write_text(run_dir / "tables.md", "\n".join(shown))


def frame_of(kind: type, rows: Sequence[Any]) -> Frame:
    """One line per row (a dataclass), one column per field; unknown values are None."""
    import pandas as pd

    columns = pd.Index([entry.name for entry in fields(kind)])
    return pd.DataFrame([asdict(row) for row in rows], columns=columns, dtype=object)


def measured(comparisons: Sequence[EstimatorComparison]) -> Frame:
    """Those that gave an estimate, with `gradients_per_step` and `relative_change`, as numbers."""
    found = frame_of(EstimatorComparison, comparisons).infer_objects()
    found = found[found["error"].isna()]
    return found.assign(
        gradients_per_step=found["gradient_evaluations"] / found["num_steps"],
        # Of no loss there is no share.
        relative_change=found["actual_change"]
        / found["outer_loss"].where(found["outer_loss"] != 0),
    )


def comparison_table(comparisons: Sequence[EstimatorComparison]) -> Frame:
    """One row per optimizer and estimator.

    The cosine at every K; everything else at the longest K that the estimator was tried at.
    """
    lengths = sorted({row.num_steps for row in comparisons})
    header = ["optimizer", "estimator", *(f"cosine, K = {k}" for k in lengths)]
    header += ["at K =", "relative error", "predicted change", "actual change"]
    header += ["gradients per step", "time in attacks", "peak MiB"]
    groups = dict(list(measured(comparisons).groupby(["optimizer", "estimator"])))
    optimizers, estimators = (
        dict.fromkeys(getattr(row, name) for row in comparisons)
        for name in ("optimizer", "estimator")
    )
    table = []
    for optimizer, estimator in itertools.product(optimizers, estimators):
        if (rows := groups.get((optimizer, estimator))) is None:
            continue
        cosines = rows.groupby("num_steps")["cosine"].agg(average)
        longest = rows["num_steps"].max()
        last = rows[rows["num_steps"] == longest]
        table.append(
            [
                *(optimizer, estimator),
                *(number(cosines.get(length), ".3f") for length in lengths),
                str(longest),
                *(number(average(last[name]), form) for name, form in _AT_LONGEST.items()),
            ]
        )
    return text_table(header, table)


def hardened_table(hardened: Sequence[Hardened]) -> Frame:
    """One row per budget, attack and variant."""
    known = known_benign(hardened)
    header = ["budget", "variant", "gradient evaluations", "defender steps", "attack"]
    header += ["steps to break", *(BENIGN_MEASURES[name] for name in known)]
    table = []
    keys = ["budget", "attack", "variant"]
    groups = frame_of(Hardened, hardened).groupby(keys, sort=False)
    # Variants stay in their order.
    for (budget, attack, variant), rows in sorted(groups, key=lambda group: group[0][:2]):
        table.append(
            [
                *(str(budget), variant),
                number(average(rows["gradient_evaluations"]), ".0f"),
                number(average(rows["num_steps"]), ".0f"),
                attack,
                break_span(zip(rows["steps_to_break"], rows["longest_attack"], strict=True)),
                *(number(average(rows[name])) for name in known),
            ]
        )
    return text_table(header, table)

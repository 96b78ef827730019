"""An ablation in TensorBoard: curves over K, the table of hyperparameters, and the figures."""

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from patcher_pl.reports.ablation import Ablation, EstimatorComparison
from patcher_pl.reports.ablation_figures import ablation_figures
from patcher_pl.reports.results import average

_SCALARS = (
    "cosine",
    "relative_error",
    "norm_ratio",
    "gradient_evaluations",
    "time_in_attacks",
    "memory_mib",
    "predicted_change",
    "actual_change",
)


def write_tensorboard(ablation: Ablation, directory: Path) -> None:
    """Writes one run per estimator and optimizer, and one with the figures, anew.

    Steps are lengths of the attack (K); values are means over seeds. `HParams` has the values at the
    longest attack.
    """
    rows = [row for row in ablation.comparisons if row.error is None]
    for optimizer, estimator in dict.fromkeys((row.optimizer, row.estimator) for row in rows):
        members = [row for row in rows if (row.optimizer, row.estimator) == (optimizer, estimator)]
        with SummaryWriter(_emptied(directory / f"{estimator} {optimizer}")) as writer:
            means = {
                num_steps: _means([row for row in members if row.num_steps == num_steps])
                for num_steps in sorted({row.num_steps for row in members})
            }
            for num_steps, values in means.items():
                for name, value in values.items():
                    writer.add_scalar(f"hypergradient/{name}", value, num_steps)
            longest = max(means)
            chosen = {"estimator": estimator, "optimizer": optimizer, "num_steps": longest}
            metrics = {f"final/{name}": value for name, value in means[longest].items()}
            _add_hparams(writer, chosen, metrics)
    with SummaryWriter(_emptied(directory / "figures")) as writer:
        for name, figure in ablation_figures(ablation).items():
            writer.add_figure(f"ablation/{name}", figure)


def _add_hparams(writer: SummaryWriter, chosen: dict[str, Any], metrics: dict[str, float]) -> None:
    """As `SummaryWriter.add_hparams`, which would write into a run of its own."""
    for summary in hparams(chosen, metrics):
        writer.file_writer.add_summary(summary)  # type: ignore[union-attr]
    for name, value in metrics.items():
        writer.add_scalar(name, value)


def _means(rows: list[EstimatorComparison]) -> dict[str, float]:
    means = {name: average(getattr(row, name) for row in rows) for name in _SCALARS}
    return {name: value for name, value in means.items() if value is not None}


def _emptied(directory: Path) -> str:
    """The folder without the event files of an earlier call, which TensorBoard would mix in."""
    for file in directory.glob("events.out.tfevents.*"):
        file.unlink()
    return str(directory)

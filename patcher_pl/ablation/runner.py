"""Measures a whole grid: each cell once, in a process of its own, whatever happens to the others."""

import multiprocessing
import signal
import threading
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from patcher_pl.ablation.cells import Cell, plan_cells
from patcher_pl.ablation.grid import ComparisonGrid
from patcher_pl.ablation.subject import Subject
from patcher_pl.processes import Children, run_all
from patcher_pl.reports.ablation import EstimatorComparison
from patcher_pl.reports.settings import weight_files

if TYPE_CHECKING:
    import torch

    from patcher_pl.ablation.measurement import Measurement

# What every measurement imports; the processes start from one that has done so.
_PRELOADED = [
    "patcher_pl.ablation.measurement",
    "torch._decomp.decompositions_for_jvp",
    "transformers.generation",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
]


def compare_estimators(
    grid: ComparisonGrid,
    subject: Subject,
    seeds: Sequence[int],
    directory: Path,
    *,
    device: "torch.device",
    num_threads: int,
    num_processes: int,
) -> list[EstimatorComparison]:
    """Measures what is not measured yet below `directory`, and returns every cell of the grid.

    The exact hypergradients come first, then everything that is compared with them. An estimate that
    fails, or whose process dies, is a row with an error and is tried again by the next call;
    interrupted measurements are repeated.

    Args:
        grid: What to measure.
        subject: The model and its problem.
        seeds: Seeds of data subsets, orders and random numbers.
        directory: Where cells are kept.
        device: Where to measure.
        num_threads: CPU threads of each process (count, >= 1).
        num_processes: Processes at the same time (count, >= 1).

    Raises:
        DataError: If a source cannot be read or has too few rows.
        RunInterrupted: If a signal stopped it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOADED, subject.language_model.module_name()])
    weights = weight_files(Path(subject.language_model.path))
    settings = {"subject": subject, "weights": weights, "device": str(device)}
    cells = plan_cells(grid, seeds, directory, settings)
    # Starting a process asks after all others, which must not happen twice at the same time.
    lock = threading.Lock()
    drawn = {seed: subject.draw(seed, max(grid.num_steps)) for seed in seeds}

    def run(cell: Cell, children: Children) -> bool:
        from patcher_pl.ablation.measurement import Measurement

        if not cell.is_reference and not cell.exact.exists():
            cell.fail("there is no exact hypergradient to compare with")
            return False
        row, batches = cell.row, drawn[cell.row.seed]
        optimizer = grid.optimizers[row.optimizer]
        measurement = Measurement(
            cell=cell,
            language_model=subject.language_model,
            inner=subject.inner_problem(optimizer, row.num_steps, batches),
            outer_batch=batches.outer,
            trial_step=grid.trial_step,
            device=device,
            num_threads=num_threads,
        )
        cell.path.unlink(missing_ok=True)
        process = context.Process(target=_work, args=(measurement,))
        with lock:
            process.start()
        children.add(process)
        wait([process.sentinel])
        with lock:
            process.join()
        children.remove(process)
        if cell.load() is None and not children.stopped_by:
            cell.fail(_death(process))
        return cell.is_done

    for label, is_reference in (("exact hypergradients", True), ("estimates", False)):
        todo = [cell for cell in cells if cell.is_reference == is_reference and not cell.is_done]
        saved = "every finished measurement is kept"
        run_all(todo, run, num_processes=num_processes, label=label, saved=saved)
    return [row for cell in cells if (row := cell.load()) is not None]


def _work(measurement: "Measurement") -> None:
    """What a process does; Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    measurement.run()


def _death(process: BaseProcess) -> str:
    if process.exitcode == -signal.SIGKILL:
        return "the process was killed, most likely for want of memory; `longest` can leave it out"
    return f"the process ended with status {process.exitcode}"

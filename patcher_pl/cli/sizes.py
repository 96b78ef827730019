"""What a run of `fit` will hold in memory, said before it begins."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from patcher_pl.cli.lightning_cli import PatcherCLI
from patcher_pl.planning import PlanSettings, Sizes, size_up

# Weights below which memory is no question, and seconds of rehearsal would be noticed (count).
MIN_PARAMETERS = 20_000_000


def tell_sizes(cli: PatcherCLI) -> dict[str, Any]:
    """Prints a line about weights, optimizer state and the planner's estimate of the peak.

    Returns:
        The same for the results, in GiB; without what could not be told. Nothing ends a run here.
    """
    try:
        with _levels_kept():
            sizes = size_up(cli.planned_run, PlanSettings(), MIN_PARAMETERS)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(f"Memory was not estimated: {reason}")
        return {}
    print(_line(sizes))
    found = {
        "num_parameters": sizes.num_parameters,
        "weights_gib": _gib(sizes.weight_bytes),
        **{f"{side}_optimizer_gib": _gib(size) for side, size in sizes.optimizer_bytes.items()},
    }
    if sizes.peak is not None:
        found["estimated_peak_gib"] = _gib(sizes.peak.device_bytes)
    return found


def _line(sizes: Sizes) -> str:
    weights = f"{sizes.num_parameters:,} weights, {_gib(sizes.weight_bytes):.3g} GiB"
    if sizes.peak is None:
        return f"{weights}."
    states = ", ".join(
        f"{side} {_gib(n):.3g} GiB" for side, n in sizes.optimizer_bytes.items() if n
    )
    return (
        f"{weights}; state of optimizers: {states}; estimated peak {_gib(sizes.peak.device_bytes):.3g} GiB in "
        f"the {sizes.peak.peak_phase} phase, with conversations of {sizes.length} tokens (`plan` has the parts)."
    )


def _gib(num_bytes: int) -> float:
    return num_bytes / 2**30


@contextmanager
def _levels_kept() -> Iterator[None]:
    # A rehearsal silences Lightning, which has a run to talk about afterwards.
    loggers = [
        logging.getLogger(f"lightning.pytorch.utilities.{name}")
        for name in ("rank_zero", "model_helpers")
    ]
    levels = [logger.level for logger in loggers]
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

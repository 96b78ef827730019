"""Area under the curve of attack success: how easily a defense breaks, in one number."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

Scale = Literal["linear", "log"]


def area_under_asr(
    attack_steps: Sequence[int], asr: Sequence[float | None], scale: Scale = "log"
) -> float | None:
    """Mean attack success rate over the attack, by trapezoids between measurements (0..1).

    Args:
        attack_steps: Attack steps N of each measurement, ascending.
        asr: Rate at each of them; None is passed over, between measured neighbors.
        scale: The axis that the mean is taken over: `linear` is N, so that late steps count most;
            `log` is log2(1 + N), so that every doubling of the attack counts as much.

    Returns:
        None where the first or the last rate is missing, or the measurements span no steps: the
        area would be of another attack.
    """
    if not asr or asr[0] is None or asr[-1] is None or attack_steps[-1] <= attack_steps[0]:
        return None
    rates = np.array([np.nan if rate is None else rate for rate in asr], dtype=float)
    return float(area_under_rows(attack_steps, rates[:, None], scale)[0])


def area_under_rows(
    attack_steps: Sequence[int], asr: Float[np.ndarray, "time row"], scale: Scale
) -> Float[np.ndarray, " row"]:
    """`area_under_asr` of many curves at once; measurements without any rate are passed over."""
    known = np.isfinite(asr).all(axis=1)
    steps = np.asarray(attack_steps, dtype=float)[known]
    places = np.log2(1 + steps) if scale == "log" else steps
    return np.trapezoid(asr[known], places, axis=0) / (places[-1] - places[0])

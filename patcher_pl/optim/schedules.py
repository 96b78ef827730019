"""Learning-rate curves as functions of the step."""

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def lr_factor(schedule: Schedule, *, step: int, num_steps: int, num_warmup_steps: int = 0) -> float:
    """What the step size is multiplied by, as transformers' schedules of these names do.

    Args:
        schedule: Shape of the curve after warm-up.
        step: Steps taken before (count, >= 0).
        num_steps: Length of the curve, warm-up included (count).
        num_warmup_steps: Steps of linear warm-up from 0 (count).
    """
    if step < num_warmup_steps:
        return step / max(1, num_warmup_steps)
    if schedule == "constant":
        return 1.0
    length = max(1, num_steps - num_warmup_steps)
    if schedule == "linear":
        return max(0.0, (num_steps - step) / length)
    progress = (step - num_warmup_steps) / length
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))

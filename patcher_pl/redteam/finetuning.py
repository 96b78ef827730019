"""The loop and the settings that the fine-tuning attacks share."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from patcher_pl.attackers.loop import Schedule, finetune
from patcher_pl.optim import Optimizer
from patcher_pl.redteam.base import AttackPoint, training_flops
from patcher_pl.types import Batch


def finetune_in_points(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    batches: Iterator[Batch],
    *,
    optimizer: Optimizer,
    attack_steps: Sequence[int],
    max_grad_norm: float | None,
    schedule: Schedule,
    num_warmup_steps: int,
) -> Iterator[AttackPoint]:
    """Fine-tunes and pauses at each of `attack_steps`; schedules span the last of them."""
    steps = finetune(
        model,
        parameters,
        batches,
        optimizer=optimizer,
        num_steps=attack_steps[-1],
        max_grad_norm=max_grad_norm,
        schedule=schedule,
        num_warmup_steps=num_warmup_steps,
    )
    num_tokens = 0
    losses: list[float] = []
    taken = 0
    for point in attack_steps:
        while taken < point:
            step = next(steps)
            taken = step.index
            num_tokens += step.num_tokens
            losses.append(step.loss)
        loss = sum(losses) / len(losses) if losses else math.nan
        yield AttackPoint(taken, num_tokens, loss, training_flops(model, num_tokens))
        losses = []


def check_settings(attack: Any) -> None:
    """Checks the fields that every fine-tuning attack has.

    Raises:
        ValueError: If a value is out of its range.
    """

    def require(holds: bool, field: str, rule: str) -> None:
        if not holds:
            name, value = type(attack).__name__, getattr(attack, field)
            raise ValueError(f"{name}.{field} must be {rule}, got {value}.")

    steps = attack.attack_steps
    ascending = all(first < second for first, second in itertools.pairwise(steps))
    require(
        bool(steps) and steps[0] == 0 and ascending,
        "attack_steps",
        "ascending step counts that start at 0",
    )
    require(attack.batch_size >= 1, "batch_size", ">= 1")
    require(
        attack.max_grad_norm is None or attack.max_grad_norm > 0, "max_grad_norm", "> 0 or null"
    )
    require(attack.num_warmup_steps >= 0, "num_warmup_steps", ">= 0")

"""The defender's optimizer, and whether its steps reach the weights."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from patcher_pl.errors import ConfigError
from patcher_pl.models.fsdp1 import uses_fsdp1
from patcher_pl.models.sharding import is_sharded
from patcher_pl.models.shards import part_of
from patcher_pl.optim.low_memory import is_of_torchao
from patcher_pl.optim.master_weights import MasterWeights, trained_in_float32
from patcher_pl.optim.moved import CHECKED_STEPS, MovedShare, is_lost
from patcher_pl.types import HALF_PRECISION

logger = logging.getLogger(__name__)


def build_optimizer(
    owner: str, model: nn.Module, parameters: Sequence[Tensor], build: Any
) -> torch.optim.Optimizer:
    """Returns the optimizer; of weights in half precision, it trains copies in float32.

    Args:
        owner: Class of the defense, for messages.
        model: Whose weights they are.
        parameters: What is trained.
        build: Makes an optimizer of parameters.

    Raises:
        ConfigError: If sharded weights are in half precision, or torchao's optimizers meet FSDP1.
    """
    masters = MasterWeights(() if is_sharded(model) else parameters)
    if masters.weights:
        return trained_in_float32(masters, build)
    if lowest := {p.dtype for p in parameters if p.dtype in HALF_PRECISION}:
        raise ConfigError(
            f"LanguageModel.dtype: {owner} trains sharded weights in "
            f"{str(lowest.pop()).removeprefix('torch.')}, in which its steps are lost to rounding. Load "
            "the model in float32 and set sharding.param_dtype to bfloat16: it computes in that."
        )
    optimizer = build(list(parameters))
    if uses_fsdp1(model) and is_of_torchao(optimizer):
        raise ConfigError(
            f"{owner}.optimizer: torchao's optimizers do not know FSDP1, got {type(optimizer).__name__}. "
            "Use FSDP2 (ModelParallelStrategy), or torch.optim.AdamW."
        )
    return optimizer


def build_scheduler(owner: str, optimizer: torch.optim.Optimizer, build: Any) -> LRScheduler:
    """Returns the schedule of learning rates.

    Raises:
        ConfigError: If it depends on more than the step.
    """
    scheduler = build(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError(
            f"{owner}.scheduler must depend on the step alone, got ReduceLROnPlateau. Use a schedule "
            "such as CosineAnnealingLR."
        )
    return scheduler


class StepCheck:
    """Looks once, after the first steps, at how many of the weights have moved.

    Args:
        owner: Class of the defense, for the message.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._moved: MovedShare | None = None
        self._left = CHECKED_STEPS
        self.share: float | None = None

    def before(self, parameters: Sequence[Tensor], optimizer: Any) -> None:
        """Looks at the gradients of a step."""
        if self._left and self._moved is None:
            trained = [tensor for group in optimizer.param_groups for tensor in group["params"]]
            self._moved = MovedShare([part_of(tensor.detach()) for tensor in trained])
        if self._moved is not None:
            grads = [parameter.grad for parameter in parameters]
            self._moved.note([None if one is None else part_of(one) for one in grads])

    def after(self, total: Callable[[Tensor], Tensor] | None) -> None:
        """Counts a step, and looks at the weights where it was the last of the first ones.

        Args:
            total: Sums over the processes that hold the other parts; None where there are none.
        """
        self._left = max(0, self._left - 1)
        if self._left or self._moved is None:
            return
        self.share, self._moved = self._moved.share(total), None
        if is_lost(self.share):
            logger.warning(
                "Only %.0f %% of the weights had moved after %d steps of %s: the others' steps were "
                "lost to rounding. Raise the learning rate, or load the model in float32.",
                *(100 * (self.share or 0), CHECKED_STEPS, self._owner),
            )

    def restore(self, share: float | None) -> None:
        """Goes on with what a checkpoint says was found; a run that is resumed is not looked at."""
        self._left, self._moved, self.share = 0, None, share

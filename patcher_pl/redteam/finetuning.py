"""What the fine-tuning attacks share: settings, steps, and the points where they pause."""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from patcher_pl.attackers.loop import FinetuneStep, Schedule, finetune
from patcher_pl.optim import Optimizer
from patcher_pl.optim.master_weights import MasterWeights
from patcher_pl.redteam.base import Attack, AttackPoint, training_flops
from patcher_pl.types import Batch


@dataclass(frozen=True, kw_only=True)
class FinetuningAttack(Attack):
    """Settings of an attack that takes optimizer steps; subclasses say what is trained on which rows.

    Args:
        optimizer: The attacker's optimizer.
        attack_steps: Optimizer steps after which the model is evaluated; ascending, from 0.
        batch_size: Rows per step (count, >= 1).
        max_grad_norm: Global gradient norm to clip to (> 0); None does not clip.
        schedule: Learning-rate curve over the last of `attack_steps`.
        num_warmup_steps: Steps of linear warm-up (count, >= 0).

    Raises:
        ValueError: If a value is out of its range.
    """

    kind: ClassVar[str]
    """What the attack is called in results, before the optimizer."""

    optimizer: Optimizer
    attack_steps: list[int]
    batch_size: int = 4
    max_grad_norm: float | None = None
    schedule: Schedule = "constant"
    num_warmup_steps: int = 0

    def __post_init__(self) -> None:
        steps = self.attack_steps
        ascending = all(first < second for first, second in itertools.pairwise(steps))
        self._require(
            bool(steps) and steps[0] == 0 and ascending,
            "attack_steps",
            "ascending step counts that start at 0",
            "0 measures the released model.",
        )
        self._require(self.batch_size >= 1, "batch_size", ">= 1", "4 is a common choice.")
        self._require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            "max_grad_norm",
            "> 0 or null",
            "Use null to leave gradients as they are.",
        )
        self._require(
            self.num_warmup_steps >= 0, "num_warmup_steps", ">= 0", "Use 0 for no warm-up."
        )

    @property
    def default_name(self) -> str:
        return f"{self.kind}_{type(self.optimizer).__name__.lower()}"

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole attack (count)."""
        return self.attack_steps[-1]

    def steps(
        self,
        model: nn.Module,
        parameters: Iterable[nn.Parameter],
        batches: Iterator[Batch],
        num_steps: int | None = None,
        masters: MasterWeights | None = None,
    ) -> Iterator[FinetuneStep]:
        """Fine-tunes with the settings of this attack and a fresh optimizer, one step per item.

        Args:
            model: Causal LM.
            parameters: What is trained.
            batches: Endless training batches.
            num_steps: Steps to take, which the schedule spans; None takes all of the attack.
            masters: What earlier steps of the attack left, as in `finetune`.
        """
        return finetune(
            model,
            parameters,
            batches,
            optimizer=self.optimizer,
            num_steps=self.num_steps if num_steps is None else num_steps,
            max_grad_norm=self.max_grad_norm,
            schedule=self.schedule,
            num_warmup_steps=self.num_warmup_steps,
            masters=masters,
        )

    def points(self, model: nn.Module, steps: Iterator[FinetuneStep]) -> Iterator[AttackPoint]:
        """Takes steps and pauses after each number of them in `attack_steps`.

        Args:
            model: What the steps change; its weights are what a step computes with.
            steps: At least as many as the last of `attack_steps`.
        """
        taken = num_tokens = 0
        moved: float | None = None
        for point in self.attack_steps:
            losses: list[float] = []
            while taken < point:
                step = next(steps)
                taken += 1
                num_tokens += step.num_tokens
                losses.append(step.loss)
                moved = step.moved if moved is None else moved
            loss = sum(losses) / len(losses) if losses else math.nan
            yield AttackPoint(taken, num_tokens, loss, training_flops(model, num_tokens), moved)

    def _require(self, holds: bool, field: str, rule: str, remedy: str) -> None:
        if not holds:
            name, value = type(self).__name__, getattr(self, field)
            raise ValueError(f"{name}.{field} must be {rule}, got {value}. {remedy}")


def all_trainable(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter of the model, switched to training whatever the release had frozen."""
    model.train()
    model.requires_grad_(True)
    return list(model.parameters())

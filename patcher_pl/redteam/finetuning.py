"""What the fine-tuning attacks share: settings, steps, and the points where they pause."""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from patcher_pl.attackers.loop import FinetuneStep, FineTuning
from patcher_pl.data.chat import ChatFormat
from patcher_pl.errors import DataError
from patcher_pl.models.peers import Peers, compute_device
from patcher_pl.optim.master_weights import MasterWeights
from patcher_pl.progress import progress_lines
from patcher_pl.redteam.asking import Asking
from patcher_pl.redteam.base import Attack, AttackPoint, training_flops
from patcher_pl.types import Batch, Conversation
from patcher_pl.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class FinetuningAttack(FineTuning, Attack):
    """Settings of an attack that takes optimizer steps; subclasses say what is trained on which rows.

    Args:
        attack_steps: Optimizer steps after which the model is evaluated; ascending, from 0.
        batch_size: Rows per step (count, >= 1).

    Raises:
        ValueError: If a value is out of its range.
    """

    kind: ClassVar[str]
    """What the attack is called in results, before the optimizer."""

    attack_steps: list[int]
    batch_size: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        steps, remedy = self.attack_steps, "0 measures the released model."
        ascending = all(first < second for first, second in itertools.pairwise(steps))
        begins = bool(steps) and steps[0] == 0
        rule = "ascending step counts that start at 0"
        require(self, begins and ascending, "attack_steps", rule, remedy)
        require(self, self.batch_size >= 1, "batch_size", ">= 1", "4 is a common choice.")

    @property
    def default_name(self) -> str:
        return f"{self.kind}_{type(self.optimizer).__name__.lower()}"

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole attack (count)."""
        return self.attack_steps[-1]

    @property
    def wording(self) -> Asking:
        """How training rows are worded."""
        return self.asking

    @property
    def row_wording(self) -> Asking | None:
        """See `Attack.row_wording`."""
        return self.wording

    def can_use(
        self, row: Conversation, tokenizer: "PreTrainedTokenizerBase", chat: ChatFormat
    ) -> bool:
        """See `Attack.can_use`: a row that is too long would be dropped, and shift the poison ratio."""
        try:
            return chat.encode(tokenizer, self.wording.reworded_row(row)) is not None
        except DataError:
            return True  # Of this attack alone: told when it is trained on.

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
        num_steps = self.num_steps if num_steps is None else num_steps
        return self.finetune(model, parameters, batches, num_steps, masters)

    def points(self, model: nn.Module, steps: Iterator[FinetuneStep]) -> Iterator[AttackPoint]:
        """Takes steps and pauses after each number of them in `attack_steps`.

        Args:
            model: What the steps change; its weights are what a step computes with.
            steps: At least as many as the last of `attack_steps`.
        """
        peers, device = Peers.of(model), compute_device(model)
        taken = num_tokens = 0
        moved: float | None = None
        with progress_lines(f"{self.name}, attack steps", self.num_steps) as lines:
            for point in self.attack_steps:
                losses: list[float] = []
                while taken < point:
                    step = next(steps)
                    taken += 1
                    num_tokens += step.num_tokens
                    losses.append(step.loss)
                    moved = step.moved if moved is None else moved
                    lines.update(taken, loss=step.loss, num_tokens=num_tokens)
                loss = sum(losses) / len(losses) if losses else math.nan
                read = round(peers.total(num_tokens, device))
                yield AttackPoint(taken, read, loss, training_flops(model, read), moved)


def all_trainable(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter of the model, switched to training whatever the release had frozen."""
    model.train()
    model.requires_grad_(True)
    return list(model.parameters())

"""Fine-tuning of low-rank adapters."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from patcher_pl.attackers.loop import Schedule
from patcher_pl.models.lora import Lora
from patcher_pl.optim import Optimizer
from patcher_pl.redteam.base import Attack, AttackPoint
from patcher_pl.redteam.finetuning import check_settings, finetune_in_points
from patcher_pl.redteam.material import AttackMaterial

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class LoraFinetuning(Attack):
    """Attaches fresh low-rank adapters to the model and fine-tunes only them.

    Args:
        optimizer: The attacker's optimizer.
        attack_steps: Optimizer steps after which the model is evaluated; ascending, from 0.
        lora: Rank, scale and place of the adapters.
        batch_size: Rows per step (count, >= 1).
        max_grad_norm: Global gradient norm to clip to (> 0); None does not clip.
        schedule: Learning-rate curve over the last of `attack_steps`.
        num_warmup_steps: Steps of linear warm-up (count, >= 0).

    Raises:
        ValueError: If a value is out of its range.

    References:
        Hu et al., 2022, https://arxiv.org/abs/2106.09685.
    """

    optimizer: Optimizer
    attack_steps: list[int]
    lora: Lora
    batch_size: int = 4
    max_grad_norm: float | None = None
    schedule: Schedule = "constant"
    num_warmup_steps: int = 0

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def default_name(self) -> str:
        """What the optimizer is called."""
        return f"lora_{type(self.optimizer).__name__.lower()}"

    def run(self, model: "PreTrainedModel", material: AttackMaterial) -> Iterator[AttackPoint]:
        """See `Attack.run`; the adapters are inserted into the layers of `model` itself."""
        adapted = self.lora.attach(model)
        adapted.train()
        yield from finetune_in_points(
            adapted,
            [parameter for parameter in adapted.parameters() if parameter.requires_grad],
            material.batches(self.batch_size, material.select("all"), self.asking),
            optimizer=self.optimizer,
            attack_steps=self.attack_steps,
            max_grad_norm=self.max_grad_norm,
            schedule=self.schedule,
            num_warmup_steps=self.num_warmup_steps,
        )

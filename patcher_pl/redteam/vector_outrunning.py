"""Fine-tuning from where the defender's simulated attack does not lead."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from patcher_pl.attackers.loop import FinetuneStep, finetune
from patcher_pl.models.shards import Shards
from patcher_pl.optim import Optimizer
from patcher_pl.redteam.base import AttackPoint
from patcher_pl.redteam.finetuning import FinetuningAttack, all_trainable
from patcher_pl.redteam.material import AttackMaterial, RowKind
from patcher_pl.types import Batch
from patcher_pl.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class VectorOutrunning(FinetuningAttack):
    """Repeats the defender's simulated attack, goes past it or away from it, and fine-tunes there.

    Defense-aware. It uses the recipe of Patcher: that theta + v was trained to refuse, where v is
    what k1 fine-tuning steps on harmful rows do to theta. The attacker has no copy of v; it makes
    its own from the released weights and harmful rows, and begins at

        theta + scale v        v = (weights after `num_simulated_steps` steps) - theta

    `scale` > 1 overshoots the point that was defended, < 0 goes the opposite way. Steps and tokens
    of the simulation count: the attack at `attack_steps` has taken the simulated steps too. While it
    simulates, it is where fine-tuning leads; the jump belongs to the last simulated step.

    The simulation takes constant steps; `schedule` and `num_warmup_steps` are those of the
    fine-tuning that follows, on all rows.

    See `FinetuningAttack` for the other settings.

    Args:
        num_simulated_steps: Steps of the simulation (count, >= 1), fewer than the whole attack
            takes: the attacker's guess of k1.
        scale: Where to begin, in units of v; neither 0 nor 1.
        simulation: Optimizer of the simulation; None takes the attack's own.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Adaptive attacks: Tramer et al., 2020, https://arxiv.org/abs/2002.08347; against defenses of
        this kind, "One Step to the Side", 2026, https://arxiv.org/abs/2605.14605. Scaled and
        negated weight differences: Ilharco et al., 2023, https://arxiv.org/abs/2212.04089. Their
        combination is this package's.
    """

    kind: ClassVar[str] = "vector_outrunning"

    num_simulated_steps: int
    scale: float = 2.0
    simulation: Optimizer | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            1 <= self.num_simulated_steps < self.num_steps,
            "num_simulated_steps",
            f"in 1..{self.num_steps - 1}, below the last of attack_steps",
            "Steps must be left for the fine-tuning from there.",
        )
        require(
            self,
            self.scale not in (0.0, 1.0) and abs(self.scale) < float("inf"),
            "scale",
            "a number other than 0 and 1",
            "Those begin where FullFinetuning would be.",
        )

    @property
    def needed_rows(self) -> frozenset[RowKind]:
        return frozenset({"harmful"})

    def run(self, model: "PreTrainedModel", material: AttackMaterial) -> Iterator[AttackPoint]:
        """See `Attack.run`."""
        harmful, mixed = (
            material.batches(self.batch_size, material.select(kind), self.asking)
            for kind in ("harmful", "all")
        )
        parameters = all_trainable(model)
        simulated = self._simulated(model, parameters, harmful)
        num_left = self.num_steps - self.num_simulated_steps
        further = self.steps(model, parameters, mixed, num_left)
        yield from self.points(model, itertools.chain(simulated, further))

    def _simulated(
        self, model: nn.Module, parameters: list[nn.Parameter], batches: Iterator[Batch]
    ) -> Iterator[FinetuneStep]:
        """The steps of the simulation; the last one ends where the fine-tuning begins."""
        shards = Shards(model, parameters)
        released = [tensor.clone() for tensor in shards.tensors]
        steps = finetune(
            model,
            parameters,
            batches,
            optimizer=self.simulation or self.optimizer,
            num_steps=self.num_simulated_steps,
            max_grad_norm=self.max_grad_norm,
        )
        for step in steps:
            if step.index == self.num_simulated_steps:
                with shards.changing() as tensors:
                    for tensor, start in zip(tensors, released, strict=True):
                        tensor.copy_(torch.lerp(start, tensor, self.scale))
            yield step

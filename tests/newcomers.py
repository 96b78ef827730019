"""What a contributor would write to add an attack or an estimator: one small class each.

They stand in the tables beside what ships, so that every contract holds for whatever comes next.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from patcher_pl.attackers import InnerProblem
from patcher_pl.hypergradients import Hypergradient, HypergradientEstimate, OuterObjective
from patcher_pl.hypergradients.attack_run import AttackRun
from patcher_pl.hypergradients.base import require_full_precision
from patcher_pl.hypergradients.first_order import attacked_in_place, outer_gradient
from patcher_pl.models import Weights
from patcher_pl.models.blocks import blocks_of
from patcher_pl.randomness import kept_random_state
from patcher_pl.redteam import AttackMaterial, FinetuningAttack
from patcher_pl.redteam.base import AttackPoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class BlockFinetuning(FinetuningAttack):
    """Fine-tunes the transformer blocks on all rows; embeddings, output head and last norm stay."""

    kind: ClassVar[str] = "blocks"

    def run(self, model: "PreTrainedModel", material: AttackMaterial) -> Iterator[AttackPoint]:
        batches = material.batches(self.batch_size, material.select("all"), self.asking)
        model.train().requires_grad_(False)
        parameters = [p for block in blocks_of(model) for p in block.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield from self.points(model, self.steps(model, parameters, batches))


@dataclass(frozen=True, kw_only=True)
class Trapezoid(Hypergradient):
    """Takes the mean of the outer gradients at both ends of the attack. Time: 2 outer gradients."""

    def estimate(
        self,
        model: nn.Module,
        weights: Weights,
        inner: InnerProblem,
        outer_loss: OuterObjective,
        before_step: Callable[[], None] = lambda: None,
    ) -> HypergradientEstimate:
        require_full_precision(self, weights.parameters)
        with attacked_in_place(weights) as (parameters, start):
            with kept_random_state(weights.shards.device):
                _, before = outer_gradient(model, parameters, outer_loss)
            run = AttackRun(model, parameters, inner, before_step)
            run.run_to(run.num_steps)
            loss, after = outer_gradient(model, parameters, outer_loss)
            return HypergradientEstimate(
                [(one + other) / 2 for one, other in zip(before, after, strict=True)],
                loss,
                weights.difference(start),
                run.num_gradients + 2.0,
                run.random_state,
                run.report(),
            )

"""An attack under way: it can be advanced, noted, put back and looked at again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patcher_pl.attackers.inner_problem import InnerProblem
from patcher_pl.hypergradients.composites import ReplayableAttention
from patcher_pl.hypergradients.hvp import HessianProduct
from patcher_pl.models.shards import Shards
from patcher_pl.optim import OptimizerState
from patcher_pl.optim.master_weights import MasterWeights
from patcher_pl.randomness import RandomState
from patcher_pl.types import move_batch


@dataclass(frozen=True)
class Point:
    """Where an attack is: everything that its next steps depend on.

    Args:
        position: Steps taken (count).
        tensors: Parameters, then moments.
        steps: Steps that each parameter has taken (counts).
    """

    position: int
    tensors: Sequence[Tensor]
    steps: Sequence[int]


class AttackRun:
    """Runs an inner problem in place on the live parameters.

    Random numbers of a step are those of its first visit.

    Args:
        model: Module under attack.
        parameters: What the attack trains; leaves that require gradients.
        inner: The attack.
        before_step: Called before every first visit of a step.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[Tensor],
        inner: InnerProblem,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.parameters = list(parameters)
        self.shards = Shards(model, self.parameters)
        self.inner = inner
        self.before_step = before_step
        self.device = self.shards.device
        self.position = 0
        # Before anything is drawn, so that `measure_trust` can repeat the attack.
        self.random_state = RandomState.capture(self.device)
        self.num_gradients = 0
        self.losses: dict[int, float] = {}
        # Of weights in half precision, copies in float32 are attacked: steps would be lost.
        self._masters = MasterWeights(self.shards.tensors)
        self.state: OptimizerState = inner.update.optimizer.init(self._masters.tensors)
        self._random: dict[int, RandomState] = {}

    @property
    def num_steps(self) -> int:
        """Steps of the whole attack (K, count)."""
        return self.inner.num_steps

    def loss(self) -> Tensor:
        """L(theta_k) on the batch of the current step, with the random numbers of that step."""
        # A step is visited again on the way back and by every Hessian-vector product; with other
        # dropout it would be the step of another attack.
        if self.position in self._random:
            self._random[self.position].restore()
        else:
            self._random[self.position] = RandomState.capture(self.device)
        batch = move_batch(self.inner.batches[self.position], self.device)
        with torch.enable_grad():
            return self.inner.loss_function(self.model, batch)

    def gradient(self) -> list[Tensor | None]:
        """Gradient of L at the current parameters; None where the loss does not depend on one."""
        if self.position not in self._random:
            self.before_step()
        # Products compute attention by other kernels. Where it drops out, both must draw alike.
        with ReplayableAttention():
            loss = self.loss()
            gradients = self.shards.gradients(loss)
        self.num_gradients += 1
        # Only at the first visit: another reduction over processes would cost time and tell nothing
        # new.
        if self.position not in self.losses:
            self.losses[self.position] = self.shards.mean(loss)
        return gradients

    def product(
        self, hvp: HessianProduct, vector: list[Tensor], gradients: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """The Hessian of L at the current parameters times `vector`; see `HessianProduct.product`."""
        found = hvp.product(self.model, self.parameters, self.loss, vector, gradients)
        return [one for one in self.shards.averaged(found) if one is not None]  # None is.

    def report(self) -> dict[str, float]:
        """Losses at the first and the last step (nats per answer token)."""
        return {
            "attack_loss_before": self.losses[0],
            "attack_loss": self.losses[self.num_steps - 1],
        }

    def advance(self, gradients: Sequence[Tensor | None]) -> None:
        """Takes the current step with the given gradients."""
        with self.shards.changing() as tensors:
            masters = self._masters
            if masters.copies:
                masters.follow()
                tensors, gradients = masters.tensors, masters.gradients(gradients)
            self.inner.update.step_(
                tensors, gradients, self.state, self.position, self.shards.reduction
            )
            masters.write_back()
        self.position += 1

    def run_to(self, position: int) -> None:
        """Takes steps until `position`."""
        while self.position < position:
            self.advance(self.gradient())

    def point(self) -> Point:
        """Returns where the attack is; shares memory with it."""
        moments = [tensor for slot in self.state.slots for tensor in slot]
        return Point(self.position, [*self.shards.tensors, *moments], list(self.state.steps))

    def go_to(self, point: Point) -> None:
        """Puts the attack where it was."""
        with self.shards.changing():
            for tensor, value in zip(self.point().tensors, point.tensors, strict=True):
                tensor.copy_(value)
        self.state.steps[:] = point.steps
        self.position = point.position

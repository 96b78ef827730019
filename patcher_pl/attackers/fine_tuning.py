"""The simulated attacker that fine-tunes the live model in place."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from torch import Tensor, nn

from patcher_pl.attackers.base import Attacker, AttackOutcome
from patcher_pl.attackers.inner_problem import InnerProblem
from patcher_pl.attackers.loop import FinetuneStep, FineTuning
from patcher_pl.models.lora import Lora, merged_copy
from patcher_pl.models.weights import Weights
from patcher_pl.optim import ClipByGlobalNorm, DifferentiableOptimizer, Update
from patcher_pl.optim.moved import is_lost
from patcher_pl.types import Batch
from patcher_pl.validation import require

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FineTuningAttacker(FineTuning, Attacker):
    """Fine-tunes from the defender's weights for `num_steps` steps (k1), each time anew.

    Full-parameter attacks run in place on the live model and cost two optimizer states and one copy
    of the weights. Attacks with `lora` train adapters on a merged copy of the model; their attack
    vector is the merged update.

    Attack vectors from several points of the trajectory cost no attack steps, but memory: one vector
    each, where `language_model.weight_copies_on` says, and with `lora` one more merged copy of the
    model for as long as each is being taken.

    Args:
        num_steps: Optimizer steps (count, >= 1); k1 = 300 in Patcher's sequential script.
        max_grad_norm: As in every attack, but 1 unless given: what the Trainer of transformers clips
            to, with which the paper's attacks are made.
        lora: Train adapters of this shape only; None trains every weight.
        vector_steps: Steps after which an attack vector is taken (counts, increasing, the last one
            `num_steps`); None takes the one at the end.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Patcher, https://arxiv.org/abs/2606.07970, the attack step of its sequential form.
    """

    num_steps: int
    max_grad_norm: float | None = 1.0
    lora: Lora | None = None
    vector_steps: list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "Use the SFT defense for a model that is not attacked in training."
        require(self, self.num_steps >= 1, "num_steps", ">= 1", remedy)
        fits = self.num_warmup_steps <= self.num_steps
        rule = f"in 0..num_steps = 0..{self.num_steps}"
        require(self, fits, "num_warmup_steps", rule, "Use 0 for no warm-up.")
        points = [0, *self._points]
        require(
            self,
            points[-1] == self.num_steps and all(a < b for a, b in pairwise(points)),
            "vector_steps",
            f"increasing counts >= 1 that end with num_steps = {self.num_steps}, or null",
            "Use null for the end of the attack alone.",
        )

    def attack(
        self,
        model: nn.Module,
        weights: Weights,
        batches: Iterator[Batch],
        before_step: Callable[[], None] = lambda: None,
    ) -> AttackOutcome:
        """See `Attacker.attack`."""
        if self.lora is not None:
            return self._attack_copy(self.lora, model, weights, batches, before_step)
        saved = weights.snapshot()
        earlier: list[Sequence[Tensor]] = []
        try:
            with weights.trainable() as parameters:
                steps = self._finetune(
                    *(model, parameters, batches, before_step),
                    lambda: earlier.append(weights.difference(saved)),
                )
            return AttackOutcome(weights.difference(saved), steps, earlier)
        finally:
            weights.restore(saved)

    @property
    def num_vectors(self) -> int:
        return len(self._points)

    @property
    def _points(self) -> list[int]:
        return [self.num_steps] if self.vector_steps is None else self.vector_steps

    @property
    def is_differentiable(self) -> bool:
        return self.lora is None and isinstance(self.optimizer, DifferentiableOptimizer)

    @property
    def works_sharded(self) -> bool:
        return self.lora is None

    def inner_problem(self, batches: Iterator[Batch]) -> InnerProblem:
        remedy = "Use FirstOrder hypergradients, or attack all weights."
        require(
            self, self.lora is None, "lora", "null for an attack that is differentiated", remedy
        )
        if not isinstance(self.optimizer, DifferentiableOptimizer):
            raise ValueError(  # noqa: TRY004  # A setting like the others.
                "FineTuningAttacker.optimizer must be AdamW or SGD for an attack that is "
                f"differentiated, got {self.optimizer}. Use one of them, or FirstOrder "
                "hypergradients."
            )
        clip = None
        if self.max_grad_norm is not None:
            clip = ClipByGlobalNorm(max_norm=self.max_grad_norm)
        update = Update(
            optimizer=self.optimizer.differentiable(),
            num_steps=self.num_steps,
            clip=clip,
            schedule=self.schedule,
            num_warmup_steps=self.num_warmup_steps,
        )
        return InnerProblem(batches=list(islice(batches, self.num_steps)), update=update)

    def _attack_copy(
        self,
        lora: Lora,
        model: nn.Module,
        weights: Weights,
        batches: Iterator[Batch],
        before_step: Callable[[], None],
    ) -> AttackOutcome:
        copy = merged_copy(model)
        start = Weights(copy).snapshot()
        adapted = lora.attach(copy).train(model.training)
        adapters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        earlier: list[Sequence[Tensor]] = []

        def vector_of(merged: nn.Module) -> Sequence[Tensor]:
            attacked = Weights(merged)
            return weights.placed(weights.aligned(attacked.difference(start), attacked.names))

        steps = self._finetune(
            *(adapted, adapters, batches, before_step),
            lambda: earlier.append(vector_of(merged_copy(adapted))),
        )
        return AttackOutcome(vector_of(adapted.merge_and_unload()), steps, earlier)

    def steps(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        batches: Iterator[Batch],
        before_step: Callable[[], None] = lambda: None,
    ) -> Iterator[FinetuneStep]:
        """Fine-tunes `parameters` in place, one step per item taken; nothing is put back."""
        taken = self.finetune(model, parameters, batches, self.num_steps)
        for _ in range(self.num_steps):
            before_step()
            step = next(taken)
            if is_lost(step.moved):
                logger.warning(
                    "Only %.0f %% of the attacked weights had moved after %d steps of %s: the others' "
                    "steps were lost to rounding. Raise FineTuningAttacker.optimizer.lr.",
                    *(100 * (step.moved or 0), step.index, type(self.optimizer).__name__),
                )
            yield step

    def _finetune(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        batches: Iterator[Batch],
        before_step: Callable[[], None],
        at_earlier_point: Callable[[], None],
    ) -> list[FinetuneStep]:
        steps: list[FinetuneStep] = []
        for step in self.steps(model, parameters, batches, before_step):
            steps.append(step)
            if step.index in self._points[:-1]:
                at_earlier_point()
        return steps

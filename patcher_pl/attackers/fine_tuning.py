"""The simulated attacker that fine-tunes the live model in place."""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any, Literal

from torch import Tensor, nn

from patcher_pl.attackers.base import Attacker, AttackOutcome, DrawnAttack
from patcher_pl.attackers.carry import Carried, Carry
from patcher_pl.attackers.growth import Growth
from patcher_pl.attackers.inner_problem import InnerProblem
from patcher_pl.attackers.loop import FinetuneStep, FineTuning, Memory
from patcher_pl.models.lending import lent
from patcher_pl.models.lora import Lora
from patcher_pl.models.shards import Shards
from patcher_pl.models.weights import Weights
from patcher_pl.optim import ClipByGlobalNorm, DifferentiableOptimizer, Update
from patcher_pl.optim.master_weights import MasterWeights
from patcher_pl.optim.moved import is_lost
from patcher_pl.randomness import derive_seed
from patcher_pl.types import Batch
from patcher_pl.validation import require

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FineTuningAttacker(FineTuning, Attacker):
    """Fine-tunes from the defender's weights for `num_steps` steps (k1), each time anew.

    Full-parameter attacks run in place on the live model and cost two optimizer states and one copy
    of the weights. Those with `lora` train adapters on the live model, adapters of the defense merged
    into it; their attack vector is the merged update.

    Attack vectors from several points of the trajectory cost no attack steps, but memory: one vector
    each, where `language_model.weight_copies_on` says.

    Args:
        num_steps: Optimizer steps (count, >= 1); k1 = 300 in Patcher's sequential script.
        max_grad_norm: As in every attack, but 1 unless given: what the Trainer of transformers clips
            to, with which the paper's attacks are made.
        lora: Train adapters of this shape only; None trains every weight.
        vector_steps: Steps after which an attack vector is taken (counts, increasing, the last one
            `num_steps`); None takes the one at the end.
        num_random_points: Take as many attack vectors instead: one at the end, the others at steps
            drawn anew for every attack (count, >= 1). None draws none.
        carry: Go on where the last attack ended; None begins every attack at the defender's weights.
        growth: Begin with shorter attacks; None gives all of them `num_steps`.
        optimizer_restart_every: Steps after which optimizer and schedule begin anew within an attack
            (count, >= 1), as those of `redteam.RestartedFinetuning`; None never.
        trains: `all` weights, or the matrix of the input `embeddings` alone (with the output head,
            where the model ties them); for attacks without `lora`.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Patcher, https://arxiv.org/abs/2606.07970, the attack step of its sequential form.
    """

    num_steps: int
    max_grad_norm: float | None = 1.0
    lora: Lora | None = None
    vector_steps: list[int] | None = None
    num_random_points: int | None = None
    carry: Carry | None = None
    growth: Growth | None = None
    optimizer_restart_every: int | None = None
    trains: Literal["all", "embeddings"] = "all"

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
        self._check_points()
        self._check_restarts()

    def _check_points(self) -> None:
        count = self.num_random_points
        holds = count is None or 1 <= count <= self.num_steps
        require(self, holds, "num_random_points", "in 1..num_steps or null", "Use 4 for some.")
        is_alone = self.vector_steps is None or (count is None and self.growth is None)
        rule = "null with `num_random_points` or `growth`"
        require(self, is_alone, "vector_steps", rule, "Use `num_random_points` for several.")

    def _check_restarts(self) -> None:
        every = self.optimizer_restart_every
        holds = every is None or every >= 1
        require(self, holds, "optimizer_restart_every", ">= 1 or null", "Use null for none.")
        remedy = "Use null for an attack on all weights, or on adapters."
        holds = self.trains in ("all", "embeddings") and (self.trains == "all" or self.lora is None)
        require(self, holds, "trains", "all, or embeddings without `lora`", remedy)
        if self.carry is None or not self.carry.keep_optimizer:
            return
        is_plain = self.lora is None and self.trains == "all" and every is None
        special = [getattr(self.optimizer, name, None) for name in ("eps_root", "state_dtype")]
        is_kept = is_plain and not any(special)
        rule = (
            "false with `lora`, `trains: embeddings`, `optimizer_restart_every`, an `eps_root` or a "
            "`state_dtype`"
        )
        require(self, is_kept, "carry.keep_optimizer", rule, "Carry the weights alone.")

    def draw(self, seed: int, number: int) -> DrawnAttack:
        """See `Attacker.draw`."""
        anew = self.carry is None or self.carry.begins_anew(seed, number)
        drawn = DrawnAttack(attacker=self, begins_anew=anew, is_carried=self.is_carried)
        if self.growth is None and self.num_random_points is None:
            return drawn
        steps = self.num_steps
        if self.growth is not None:
            steps = self.growth.num_steps(self.num_steps, number)
        points = self.vector_steps
        if self.num_random_points is not None:
            earlier = range(1, steps)
            generator = random.Random(derive_seed(seed, "points", number))
            num_earlier = min(self.num_random_points - 1, len(earlier))
            points = [*sorted(generator.sample(earlier, num_earlier)), steps]
        attacker = replace(
            self,
            num_steps=steps,
            vector_steps=points,
            growth=None,
            num_random_points=None,
            num_warmup_steps=min(self.num_warmup_steps, steps),
        )
        return replace(drawn, attacker=attacker)

    def steps_before(self, seed: int, number: int) -> int:
        """See `Attacker.steps_before`."""
        if self.growth is None:
            return number * self.num_steps
        return sum(self.growth.num_steps(self.num_steps, earlier) for earlier in range(number))

    def attack(
        self,
        model: nn.Module,
        weights: Weights,
        batches: Iterator[Batch],
        before_step: Callable[[], None] = lambda: None,
        start: Carried | None = None,
    ) -> AttackOutcome:
        """See `Attacker.attack`."""
        if self.lora is not None:
            return self._train_adapters(self.lora, model, weights, batches, before_step, start)
        memory = self._memory(start)
        saved = weights.snapshot()
        earlier: list[Sequence[Tensor]] = []
        try:
            if start is not None:
                weights.add(start.vector, self._scale)
            with weights.trainable() as parameters:
                steps = self._finetune(
                    *(model, self._trained(model, parameters), batches, before_step),
                    lambda: earlier.append(weights.difference(saved)),
                    memory,
                )
            moments = None if memory is None else memory.moments
            return AttackOutcome(weights.difference(saved), steps, earlier, moments)
        finally:
            weights.restore(saved)

    @property
    def num_vectors(self) -> int:
        return len(self._points) if self.num_random_points is None else self.num_random_points

    @property
    def _points(self) -> list[int]:
        return [self.num_steps] if self.vector_steps is None else self.vector_steps

    @property
    def is_carried(self) -> bool:
        return self.carry is not None

    @property
    def is_differentiable(self) -> bool:
        is_plain = self.lora is None and self.carry is None and self.trains == "all"
        is_smooth = self.optimizer_restart_every is None
        return is_plain and is_smooth and self.optimizer.is_differentiable

    @property
    def works_sharded(self) -> bool:
        return self.trains == "all"

    @property
    def works_with_fsdp1(self) -> bool:
        return self.works_sharded and self.lora is None  # Its units take no further parameters.

    @property
    def _scale(self) -> float:
        return 1.0 if self.carry is None else self.carry.scale

    def _memory(self, start: Carried | None) -> Memory | None:
        if self.carry is None or not self.carry.keep_optimizer:
            return None
        return Memory(None if start is None else start.moments)

    def _trained(self, model: nn.Module, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        if self.trains == "all":
            return parameters
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        return [embeddings.weight]

    def inner_problem(self, batches: Iterator[Batch]) -> InnerProblem:
        remedy, rule = "Use FirstOrder hypergradients.", "for an attack that is differentiated"
        require(self, self.lora is None, "lora", f"null {rule}", remedy)
        require(self, self.carry is None, "carry", f"null {rule}", remedy)
        require(self, self.trains == "all", "trains", f"all {rule}", remedy)
        restarts = self.optimizer_restart_every
        require(self, restarts is None, "optimizer_restart_every", f"null {rule}", remedy)
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

    def _train_adapters(
        self,
        lora: Lora,
        model: nn.Module,
        weights: Weights,
        batches: Iterator[Batch],
        before_step: Callable[[], None],
        start: Carried | None,
    ) -> AttackOutcome:
        from peft import PeftModel

        weights.shards.require_no_open_pass("An attack")
        # Adapters change no weight; merging those of the defense and carrying do.
        changes = isinstance(model, PeftModel) or start is not None
        was_training = model.training
        with lent(model, keeps_values=changes) as target:
            released = Weights(target)
            if start is not None:
                released.add(released.aligned(start.vector, weights.names), self._scale)
            adapted = lora.attach(target).train(was_training)
            adapters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
            earlier: list[Sequence[Tensor]] = []

            def vector() -> Sequence[Tensor]:
                update = released.update_of(adapted)
                if start is not None:
                    carried = released.aligned(start.vector, weights.names)
                    for change, before in zip(update, carried, strict=True):
                        change.add_(before.to(change.device), alpha=self._scale)
                return weights.placed(weights.aligned(update, released.names))

            steps = self._finetune(
                *(adapted, adapters, batches, before_step), lambda: earlier.append(vector())
            )
            return AttackOutcome(vector(), steps, earlier)

    def steps(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        batches: Iterator[Batch],
        before_step: Callable[[], None] = lambda: None,
    ) -> Iterator[FinetuneStep]:
        """Fine-tunes `parameters` in place, one step per item taken; nothing is put back."""
        return self._steps(model, parameters, batches, before_step, None)

    def _steps(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        batches: Iterator[Batch],
        before_step: Callable[[], None],
        memory: Memory | None,
    ) -> Iterator[FinetuneStep]:
        taken = self._periods(model, parameters, batches, memory)
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

    def _periods(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        batches: Iterator[Batch],
        memory: Memory | None,
    ) -> Iterator[FinetuneStep]:
        """All steps, with one optimizer or one after the other."""
        every = self.optimizer_restart_every or self.num_steps
        # Of the optimizer, not of the weights: in half precision they would lose their last steps.
        masters = MasterWeights(Shards(model, parameters).tensors)
        for done in range(0, self.num_steps, every):
            length = min(every, self.num_steps - done)
            for step in self.finetune(model, parameters, batches, length, masters, memory):
                yield replace(step, index=done + step.index)

    def _finetune(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        batches: Iterator[Batch],
        before_step: Callable[[], None],
        at_earlier_point: Callable[[], None],
        memory: Memory | None = None,
    ) -> list[FinetuneStep]:
        steps: list[FinetuneStep] = []
        for step in self._steps(model, parameters, batches, before_step, memory):
            steps.append(step)
            if step.index in self._points[:-1]:
                at_earlier_point()
        return steps

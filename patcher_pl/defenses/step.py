"""One defender step: what its helpers may touch, what it costs, and the way back from it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patcher_pl.attackers import DrawnAttack
from patcher_pl.data.stream import BatchStream
from patcher_pl.errors import RunInterrupted
from patcher_pl.models import Weights
from patcher_pl.randomness import RandomState, derive_seed
from patcher_pl.types import Batch, count_tokens, move_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Cost:
    """Counters of a run, in units that do not depend on the machine.

    Args:
        gradient_evaluations: Forward-backward passes over one batch, attacks included (count).
        tokens: Tokens in them, padding excluded (count).
    """

    gradient_evaluations: int = 0
    tokens: int = 0

    def add(self, *, num_tokens: int, gradient_evaluations: int = 1) -> None:
        """Counts gradient evaluations: one, or what something dearer amounts to."""
        self.gradient_evaluations += gradient_evaluations
        self.tokens += num_tokens

    def state(self) -> dict[str, int]:
        """Returns the counters, for a checkpoint."""
        return asdict(self)


@dataclass(kw_only=True, eq=False)
class Step:
    """One defender step, as its helpers see it: they get this in place of the defense.

    Whatever is drawn, counted or taken through it can be undone, so that a run which is stopped
    within the step goes on as if the step had never begun.

    Args:
        owner: Class of the defense, for messages.
        number: Defender steps before this one (count).
        model: The live model.
        all_weights: Owner of every weight, those under adapters too: what attackers get.
        trained_weights: Owner of what the defense trains: every weight, or the adapters.
        device: Where batches and random numbers belong.
        data: Data module of the run.
        loader: The defender's own stream.
        cost: Counters of the run.
        backward: Backward pass of a scaled loss on a batch, counted as one gradient evaluation.
        log: Logs numbers by name at once, at the defender's step unless another place is given.
        check_for_stop: To be called where the step can be left; raises `RunInterrupted` in all
            processes if one of them was asked to stop.
    """

    owner: str
    number: int
    model: "PreTrainedModel"
    all_weights: Weights
    trained_weights: Weights
    device: torch.device
    data: Any
    loader: Any
    cost: Cost
    backward: Callable[[Tensor, Batch], None]
    log: Callable[..., None]
    check_for_stop: Callable[[], None]
    _ways_back: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Taken when the step begins, whatever runs first in it.
        random_state, spent = RandomState.capture(self.device), self.cost.state()
        self.on_undo(random_state.restore)
        self.on_undo(lambda: vars(self.cost).update(spent))

    def on_undo(self, way_back: Callable[[], None]) -> None:
        """Adds to what is done where the step is undone, the newest first."""
        self._ways_back.append(way_back)

    @contextmanager
    def undoable(self) -> Iterator[None]:
        """Undoes all of the step so far if the block is left because the run is to stop.

        Nothing is undone after any other error: the run has failed, and is not saved.
        """
        try:
            yield
        except RunInterrupted:
            while self._ways_back:
                # The newest first: a stream is put back before the generators that it drew from.
                self._ways_back.pop()()
            raise

    @property
    def seed(self) -> int:
        """Seed of the run's data."""
        return getattr(self.data, "seed", 0)  # A rehearsal's data has none.

    def seed_of(self, *names: str | int) -> int:
        """A seed for draws that do not depend on where a run was interrupted."""
        return derive_seed(self.seed, *names)

    @property
    def position(self) -> int:
        """Place of the batch at hand in the defender's stream (count from 0)."""
        return self.loader.position - 1

    @cached_property
    def attack_stream(self) -> BatchStream:
        """The run's attack data, whose position is saved with checkpoints."""
        stream: BatchStream = self.data.attack_stream()
        before = {"position": stream.position}
        self.on_undo(lambda: stream.load_state_dict(before))
        return stream

    def next_harmful_batch(self) -> Batch:
        """Takes the next batch of the attack data."""
        return move_batch(next(self.attack_stream.endless()), self.device)

    def attack_batches(self, drawn: DrawnAttack) -> Iterator[Batch]:
        """Returns the batches of one attack, which is to take all of its steps."""
        stream = self.attack_stream
        if drawn.data.is_of_run:
            return stream.endless()
        own = self.data.attack_stream_of(drawn.data)
        own.load_state_dict({"position": stream.position})
        # As if the attack had taken them there: what later attacks train on does not depend on whose
        # data this one takes.
        stream.load_state_dict({"position": stream.position + drawn.attacker.num_steps})
        return own.endless()

    def gradients_of(self, loss: Callable[[], Tensor], batch: Batch) -> tuple[list[Tensor], Tensor]:
        """Returns a gradient by what is trained, and the loss; leaves every `.grad` as it is.

        Args:
            loss: One forward pass over `batch`, with the weights as they are now.
            batch: Whose tokens are counted.
        """
        weights = self.trained_weights
        with weights.trainable():
            value = loss()
            found = weights.shards.gradients(value)
        self.cost.add(num_tokens=count_tokens(batch))
        pairs = zip(found, weights.shards.tensors, strict=True)
        return [torch.zeros_like(part) if g is None else g for g, part in pairs], value.detach()

"""Streams of batches that are shuffled, grouped by length, and can be wound to any position."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch

from patcher_pl.data.chat import Encoded
from patcher_pl.data.collate import collate
from patcher_pl.randomness import derive_seed
from patcher_pl.types import IGNORE_INDEX, Batch

Item = TypeVar("Item")

# Batches that are sorted by length together: more save more padding, fewer mix lengths better.
_GROUPED_BATCHES = 50


class BatchStream:
    """Batches of an in-memory data set, epoch after epoch, as a function of seed and position.

    The batch at a position is the same whatever was handed out before, so a stream goes on exactly
    where it was once its position is restored. Every batch is full: the last one of an epoch is
    filled up with rows from the beginning of that epoch, so no row is left out and a set smaller
    than a batch repeats its rows. With several replicas, each gets its own share of every step: the
    shares of all together are what one replica with a batch of that size gets.

    Lightning uses it as a loader: `len` is the batches of an epoch, iterating yields what is left of
    the current one, `state_dict` goes into checkpoints.

    Args:
        examples: Tokenized conversations (at least one).
        batch_size: Examples per batch (>= 1), on one replica.
        pad_token_id: Token that fills shorter rows.
        seed: Decides the order of every epoch.
        group_by_length: Put examples of similar length into the same batch. Saves padding, but
            where one kind of answer is shorter, as refusals are, batches hold one kind alone.
        packing: Pack the examples of a batch into one row instead of padding them; see `collate`.
        num_replicas: Processes that share the data (>= 1).
        rank: This process among them.
        shares_batch: Let `batch_size` be that of all replicas together, which need not divide it.
            One that is left without a row gets one that does not count: its `loss_weight` is 0.

    Raises:
        ValueError: If a value is out of its range.
    """

    def __init__(
        self,
        examples: Sequence[Encoded],
        *,
        batch_size: int,
        pad_token_id: int,
        seed: int,
        group_by_length: bool = False,
        packing: bool = False,
        num_replicas: int = 1,
        rank: int = 0,
        shares_batch: bool = False,
    ) -> None:
        if not examples:
            raise ValueError("BatchStream.examples must not be empty.")
        if batch_size < 1:
            raise ValueError(f"BatchStream.batch_size must be >= 1, got {batch_size}.")
        if not 0 <= rank < num_replicas:
            raise ValueError(
                f"BatchStream.rank must be in [0, num_replicas), got {rank} of {num_replicas}."
            )
        self._examples = examples
        self._pad_token_id = pad_token_id
        self._seed = seed
        self._group_by_length = group_by_length
        self._packing = packing
        self._num_replicas = num_replicas
        self._rank = rank
        self._rows_per_step = batch_size if shares_batch else batch_size * num_replicas
        self._position = 0
        self._plan_of: tuple[int, list[list[int]]] | None = None

    def __len__(self) -> int:
        """Batches of one epoch, on one replica."""
        return -(-len(self._examples) // self._rows_per_step)

    def __iter__(self) -> Iterator[Batch]:
        """Yields what is left of the current epoch; at its end, the whole next one."""
        end = (self._position // len(self) + 1) * len(self)
        while self._position < end:
            yield self._next()

    def endless(self) -> Iterator[Batch]:
        """Yields batches across epochs, from the current position on, without end."""
        while True:
            yield self._next()

    @property
    def position(self) -> int:
        """Batches handed out so far, over all epochs."""
        return self._position

    def rewind(self, num_batches: int = 1) -> None:
        """Takes back the newest batches: they are handed out again, also by running iterators.

        Raises:
            ValueError: If fewer batches than that were handed out.
        """
        if not 0 <= num_batches <= self._position:
            raise ValueError(
                f"BatchStream.rewind must get 0 to {self._position} batches, got {num_batches}."
            )
        self._position -= num_batches

    def state_dict(self) -> dict[str, Any]:
        """Returns the position and the rows of a step, for a checkpoint."""
        return {"position": self._position, "rows_per_step": self._rows_per_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes to the position of a checkpoint.

        With as many rows per step as its writer, however many replicas share them, the same rows
        follow. With more or fewer, those of an equally advanced stream do.
        """
        written_with = int(state_dict.get("rows_per_step", self._rows_per_step))
        self._position = int(state_dict["position"]) * written_with // self._rows_per_step

    def _next(self) -> Batch:
        epoch, index = divmod(self._position, len(self))
        step = self._plan(epoch)[index]
        own = step[self._rank :: self._num_replicas]
        self._position += 1
        examples = [self._examples[row] for row in own or step[:1]]
        batch = collate(examples, self._pad_token_id, packing=self._packing)
        if self._num_replicas > 1:
            mean = max(1, self._num_labels(step)) / self._num_replicas
            share = self._num_labels(own) / mean
            batch["loss_weight"] = torch.tensor(share, dtype=torch.float64)
        return batch

    def _plan(self, epoch: int) -> list[list[int]]:
        """Returns the rows of every step of an epoch, all replicas together."""
        if self._plan_of is None or self._plan_of[0] != epoch:
            self._plan_of = (epoch, self._planned(epoch))
        return self._plan_of[1]

    def _planned(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "epoch", epoch))
        order = torch.randperm(len(self._examples), generator=generator).tolist()
        num_rows = len(self) * self._rows_per_step
        order = (order * -(-num_rows // len(order)))[:num_rows]
        if not self._group_by_length:
            return _chunks(order, self._rows_per_step)
        # At least four groups in an epoch, so that which rows meet differs from epoch to epoch.
        grouped = max(1, min(_GROUPED_BATCHES, len(self) // 4)) * self._rows_per_step
        steps = [
            step
            for group in _chunks(order, grouped)
            for step in _chunks(sorted(group, key=self._length), self._rows_per_step)
        ]
        shuffled = torch.randperm(len(steps), generator=generator).tolist()
        return [steps[index] for index in shuffled]

    def _num_labels(self, rows: list[int]) -> int:
        # As the loss counts: the first token has nothing to be predicted from.
        return sum(
            label != IGNORE_INDEX for row in rows for label in self._examples[row].labels[1:]
        )

    def _length(self, row: int) -> int:
        return len(self._examples[row].input_ids)


class FixedBatches:
    """Batches of a data set in its own order, the same every time; the last one may be short.

    Args:
        examples: Tokenized conversations.
        batch_size: Examples per batch (>= 1).
        pad_token_id: Token that fills shorter rows.
        packing: Pack the examples of a batch into one row instead of padding them.
    """

    def __init__(
        self,
        examples: Sequence[Encoded],
        *,
        batch_size: int,
        pad_token_id: int,
        packing: bool = False,
    ) -> None:
        self._examples = examples
        self._batch_size = batch_size
        self._pad_token_id = pad_token_id
        self._packing = packing

    def __len__(self) -> int:
        """Batches altogether."""
        return -(-len(self._examples) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yields every batch once."""
        for chunk in _chunks(self._examples, self._batch_size):
            yield collate(chunk, self._pad_token_id, packing=self._packing)


def _chunks(items: Sequence[Item], size: int) -> list[list[Item]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]

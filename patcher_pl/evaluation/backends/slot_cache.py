"""A key-value cache whose rows come and go: every row has a slot, filled from the left."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer

Pair = tuple[Tensor, Tensor]
# Columns that are added when the slots are full; growing copies them.
GROWTH = 128


class SlotCache(Cache):
    """Cache for decoding steps of one token, in which rows are as long as they are.

    A row's next token goes behind its own last one, not behind the longest row's. What is behind a
    row's end is zero or left over from earlier rows; the attention mask of the caller hides it.

    Args:
        num_layers: Layers of the model that keep keys and values (count).
        num_rows: Most rows at a time (count).
        num_columns: Longest row (tokens).
    """

    def __init__(self, num_layers: int, num_rows: int, num_columns: int) -> None:
        self.slots = [_SlotLayer(num_rows, num_columns) for _ in range(num_layers)]
        super().__init__(layers=list(self.slots))
        self.num_rows = 0

    def append(self, filled: Cache) -> None:
        """Takes over the rows of `filled`, behind those that are there."""
        layers: list[Any] = filled.layers
        for slot, layer in zip(self.slots, layers, strict=True):
            slot.append(self.num_rows, layer.keys, layer.values)
        self.num_rows += len(layers[0].keys)

    def keep(
        self, num_rows: int, sources: Int[Tensor, " moved"], gaps: Int[Tensor, " moved"]
    ) -> None:
        """Moves rows from `sources` to `gaps`; the first `num_rows` rows are left."""
        for slot in self.slots:
            slot.move(sources, gaps)
        self.num_rows = num_rows

    def aim(self, columns: Int[Tensor, " rows"], width: int) -> None:
        """The next step writes to these columns, one per row, and reads the first `width`."""
        rows = torch.arange(self.num_rows, device=columns.device)
        for slot in self.slots:
            slot.aim(rows, columns, width)


class _SlotLayer(DynamicLayer):
    """Keys and values by slot: (slots, heads, columns, width of a head)."""

    def __init__(self, num_rows: int, num_columns: int) -> None:
        super().__init__()
        self._num_rows, self._num_columns = num_rows, num_columns
        self.width = 0

    def append(
        self,
        num_rows: int,
        keys: Float[Tensor, "new heads time key"],
        values: Float[Tensor, "new heads time value"],
    ) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values = (
                states.new_zeros(self._num_rows, states.shape[1], 0, states.shape[3])
                for states in (keys, values)
            )
        self._reserve(keys.shape[2])
        new, length = slice(num_rows, num_rows + len(keys)), keys.shape[2]
        for slots, states in zip(self._pair(), (keys, values), strict=True):
            slots[new, :, :length] = states
            # Hidden, but what is not finite would show through the mask.
            slots[new, :, length:] = 0

    def move(self, sources: Tensor, gaps: Tensor) -> None:
        for slots in self._pair():
            slots[gaps] = slots[sources]

    def aim(self, rows: Tensor, columns: Tensor, width: int) -> None:
        self.rows, self.columns, self.width = rows, columns, width
        self._reserve(width)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        for slots, states in zip(self._pair(), (key_states, value_states), strict=True):
            slots[self.rows, :, self.columns] = states[:, :, 0]
        keys, values = self._pair()
        return keys[: len(self.rows), :, : self.width], values[: len(self.rows), :, : self.width]

    def get_seq_length(self) -> int:
        # What the masks are made from: the token of this step is the last column.
        return max(self.width - 1, 0)

    def _pair(self) -> Pair:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _reserve(self, width: int) -> None:
        keys, values = self._pair()
        if width > keys.shape[2]:
            columns = min(-(-width // GROWTH) * GROWTH, self._num_columns)
            missing = (0, 0, 0, columns - keys.shape[2])
            self.keys, self.values = pad(keys, missing), pad(values, missing)

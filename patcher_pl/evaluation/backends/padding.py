"""Sequences of different length in one tensor."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor


def left_padded(
    batch: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """Returns token ids and attention mask, with every sequence ending in the last column."""
    longest = max(len(ids) for ids in batch)
    padding = [longest - len(ids) for ids in batch]
    input_ids = [[pad_id] * pad + list(ids) for pad, ids in zip(padding, batch, strict=True)]
    mask = [[0] * pad + [1] * len(ids) for pad, ids in zip(padding, batch, strict=True)]
    return torch.tensor(input_ids), torch.tensor(mask)

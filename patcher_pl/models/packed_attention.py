"""Torch's attention on packed batches, one conversation at a time."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

NAME = "packed_sdpa"


def register() -> None:
    """Makes `attn_implementation: packed_sdpa` known to transformers."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_sdpa)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As `sdpa` of transformers, without the pairs of tokens of different conversations.

    Where the mask says more than which conversations there are (padded batches, sliding windows),
    or nothing, all is left to `sdpa`.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    lengths = _lengths(attention_mask) if options.get("position_bias") is None else None
    if lengths is None or key.shape[2] != query.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    outputs = [
        sdpa_attention_forward(module, one, keys[index], values[index], None, **options)[0]
        for index, one in enumerate(queries)
    ]
    return torch.cat(outputs, dim=1), None


# Of the newest mask: all layers of a forward pass share one.
_newest: tuple[weakref.ref[Tensor], list[int] | None] | None = None


def _lengths(mask: Tensor | None) -> list[int] | None:
    global _newest
    if mask is None:
        return None
    if _newest is None or _newest[0]() is not mask:
        _newest = weakref.ref(mask), _read(mask)
    return _newest[1]


@torch.no_grad()
def _read(mask: Tensor) -> list[int] | None:
    """Lengths of the conversations of a mask that is causal within them; None of any other."""
    if mask.dtype != torch.bool or mask.shape[:2] != (1, 1) or mask.shape[2] != mask.shape[3]:
        return None
    seen = mask[0, 0]
    # The first token of a conversation sees itself alone.
    starts = (seen.sum(dim=1) == 1).nonzero().flatten().tolist()
    if not starts or starts[0] != 0:
        return None
    ends = [*starts[1:], len(seen)]
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    blocks = [torch.ones(length, length, dtype=torch.bool).tril() for length in lengths]
    expected = torch.block_diag(*blocks).to(mask.device)
    return lengths if torch.equal(seen, expected) else None

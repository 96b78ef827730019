"""Torch's attention on packed batches, within each conversation only."""

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from patcher_pl.types import HALF_PRECISION

NAME = "packed_sdpa"


class Packed(NamedTuple):
    """What stands in the place of a mask where a row holds several conversations.

    Args:
        bounds: Tokens before each conversation, and of all of them; int32 (conversations + 1,).
        longest: Tokens of the longest conversation.
    """

    bounds: Tensor
    longest: int


def register() -> None:
    """Makes `attn_implementation: packed_sdpa` known to transformers."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_sdpa)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, packed_mask)


def packed_mask(*, mask_function: Callable[..., Any], **options: Any) -> Tensor | Packed | None:
    """The mask of `sdpa`, or where the conversations of a packed row begin.

    transformers calls it once per forward pass (and kind of layer), with the rule that says which
    tokens attend to which. Asking the rule about neighbors and first tokens takes O(T) instead of a
    mask of T x T.
    """
    from transformers.masking_utils import sdpa_mask

    size = options["q_length"]
    may_be_packed = (
        options.get("attention_mask") is None
        and not options.get("allow_is_causal_skip", True)
        and not options.get("use_vmap", False)  # Rules that are no plain causal ones.
        and options["batch_size"] == 1
        and size == options["kv_length"]
    )
    if may_be_packed:
        packed = _conversations(mask_function, size, options["device"])
        if packed is not None:
            return packed
    return sdpa_mask(mask_function=mask_function, **options)


@torch.no_grad()
def _conversations(
    sees: Callable[..., Tensor], size: int, device: torch.device | str
) -> Packed | None:
    """Reads the conversations off the rule; None where it is not causal attention within them."""
    zero = torch.zeros((), dtype=torch.long, device=device)
    places = torch.arange(size, device=device)
    begins = torch.ones(size, dtype=torch.bool, device=device)
    # A token that cannot see its neighbor on the left begins a conversation.
    begins[1:] = ~sees(zero, zero, places[1:], places[:-1])
    starts = begins.nonzero().flatten()
    ends = torch.cat([starts[1:], starts.new_tensor([size])])
    first = starts.repeat_interleave(ends - starts, output_size=size)
    # A sliding window or a chunk hides first tokens; a prefix would see what comes after it.
    if not bool(sees(zero, zero, places, first).all()) or bool(
        sees(zero, zero, places[:-1], places[1:]).any()
    ):
        return None
    bounds = torch.cat([starts.new_zeros(1), ends]).int()
    return Packed(bounds, int((ends - starts).max()))


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Packed | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As `sdpa` of transformers, without the pairs of tokens of different conversations.

    In half precision on a GPU one kernel takes all conversations (torch >= 2.10); elsewhere each one
    is a call of its own.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not isinstance(attention_mask, Packed):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    plain = options.get("position_bias") is None and not options.get("dropout")
    dtype = query.dtype
    if query.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")  # As autocast does for torch's own attention.
    if plain and query.is_cuda and dtype in HALF_PRECISION and _takes_many() is not None:
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        return _all_at_once(query, key, value, attention_mask, options.get("scaling")), None
    lengths = attention_mask.bounds.diff().tolist()
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    outputs = [
        sdpa_attention_forward(module, one, keys[index], values[index], None, **options)[0]
        for index, one in enumerate(queries)
    ]
    return torch.cat(outputs, dim=1), None


def _all_at_once(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float | None
) -> Tensor:
    """Attention of all conversations; tensors are (1, heads, time, units), the result has time first."""
    attend = _takes_many()
    assert attend is not None
    num_groups, extra = query.shape[1] // key.shape[1], {}
    if num_groups > 1 and "enable_gqa" in signature(attend).parameters:
        extra["enable_gqa"] = True
    elif num_groups > 1:
        key, value = (tensor.repeat_interleave(num_groups, dim=1) for tensor in (key, value))
    rows = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    bounds, longest = packed
    # A window of (-1, 0): everything before, nothing after.
    found = attend(
        *rows, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), **extra
    )
    return found.unsqueeze(0)


@cache
def _takes_many() -> Callable[..., Any] | None:
    """Torch's attention over conversations of several lengths; None before torch 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in signature(varlen_attn).parameters else None

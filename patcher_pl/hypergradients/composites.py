"""Operations that can be differentiated twice, and forward, in place of fused ones.

Fused attention has no second derivative, and the forward derivatives of softmax, SiLU and others
cannot be differentiated again. Inside `Composites` they are computed from plain arithmetic, whatever
attention a model is configured with; the model itself is not touched.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from patcher_pl.types import IGNORE_INDEX


class Composites(TorchFunctionMode):
    """Substitutes composites for fused operations for the length of a block."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        substitute = _SUBSTITUTES.get(func)
        if substitute is not None:
            result = substitute(*args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)


class ReplayableAttention(TorchFunctionMode):
    """Lets attention draw its dropout as `Composites` does, so that both draw the same.

    Fused kernels draw their random numbers in ways of their own. Without dropout they stay.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            dropout = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
            if dropout > 0:
                return _attention(*args, **kwargs)
        return func(*args, **kwargs)


class SplitDuals(TorchFunctionMode):
    """Computes exp, sigmoid and tanh of dual numbers as primal and tangent, outside of `Composites`.

    Torch saves their result for the backward pass with its tangent, whose graph leads back to the
    result: a circle that is kept until the dual level ends, whatever else is let go. Not for passes
    that carry tangents backwards.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        slope = _SLOPES.get(func)
        if slope is not None and not kwargs and len(args) == 1:
            primal, tangent = forward_ad.unpack_dual(args[0])
            if tangent is not None:
                result = func(primal)
                return forward_ad.make_dual(result, slope(result) * tangent)
        return func(*args, **(kwargs or {}))


@contextmanager
def twice_differentiable_attention() -> Iterator[None]:
    """Lets backward passes be differentiated for the length of a block; all but attention can be.

    Fused attention is replaced by torch's own plain one, so that nothing else of this file is needed.
    """
    with ReplayableAttention(), sdpa_kernel(SDPBackend.MATH):
        yield


def _log_sum_exp(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    # The shift cancels out of the result, so its derivative may be left out; with it, `amax` would
    # have to be differentiated twice.
    shifted = x - x.detach().amax(dim, keepdim=True)
    return shifted, shifted.exp().sum(dim, keepdim=True)


def _softmax(
    input: Tensor, dim: int | None = None, *_: Any, dtype: torch.dtype | None = None, **__: Any
) -> Tensor | None:
    if dim is None:
        return None
    x = input if dtype is None else input.to(dtype)
    shifted, total = _log_sum_exp(x, dim)
    return shifted.exp() / total


def _log_softmax(
    input: Tensor, dim: int | None = None, *_: Any, dtype: torch.dtype | None = None, **__: Any
) -> Tensor | None:
    if dim is None:
        return None
    x = input if dtype is None else input.to(dtype)
    shifted, total = _log_sum_exp(x, dim)
    return shifted - total.log()


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    special = weight is not None or label_smoothing or size_average is not None
    # None hands the call on to torch: its value is right, and so is its first derivative.
    if special or reduce is not None or input.dim() != 2 or target.is_floating_point():
        return None
    counted = target != ignore_index
    shifted, total = _log_sum_exp(input, 1)
    # Ignored targets are no index; 0 is one, and what it picks is masked below.
    picked = shifted.gather(1, target.where(counted, 0).unsqueeze(1))
    losses = (total.log() - picked).squeeze(1).where(counted, 0.0)
    if reduction == "none":
        return losses
    # No targets at all give 0 / 0 = NaN, as torch does.
    return losses.sum() / counted.sum() if reduction == "mean" else losses.sum()


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(repeats, -3) for x in (key, value))
    scores = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        shape = scores.shape[-2:]
        attn_mask = torch.ones(shape, dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # Not -inf: a row that attends to nothing (padding) must stay finite.
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    shifted, total = _log_sum_exp(scores, -1)
    shares = shifted.exp() / total
    if dropout_p > 0:
        shares = functional.dropout(shares, dropout_p, training=True)
    return shares @ value


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    return input * input.sigmoid()


def _gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (input + 0.044715 * input * input * input)
        return 0.5 * input * (1 + inner.tanh())
    return 0.5 * input * (1 + (input / math.sqrt(2)).erf())


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    centered = input - input.mean(dims, keepdim=True)
    x = centered * (centered * centered).mean(dims, keepdim=True).add(eps).rsqrt()
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    x = input * (input * input).mean(dims, keepdim=True).add(eps).rsqrt()
    return x if weight is None else x * weight


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    if padding_idx is None or max_norm is not None or scale_grad_by_freq or sparse:
        return None
    # The gradient that attacks use is zero on this row. Forward derivatives must not see it either.
    row = padding_idx if padding_idx >= 0 else weight.shape[0] + padding_idx
    rows = functional.embedding(input, weight)
    return torch.where((input == row).unsqueeze(-1), rows.detach(), rows)


# Derivatives by results.
_SLOPES: dict[Any, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys((torch.exp, Tensor.exp), lambda y: y),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid), lambda y: y * (1 - y)),
    **dict.fromkeys((torch.tanh, Tensor.tanh), lambda y: 1 - y * y),
}
_SUBSTITUTES: dict[Any, Callable[..., Tensor | None]] = {
    functional.scaled_dot_product_attention: _attention,
    functional.softmax: _softmax,
    torch.softmax: _softmax,
    Tensor.softmax: _softmax,
    functional.log_softmax: _log_softmax,
    torch.log_softmax: _log_softmax,
    Tensor.log_softmax: _log_softmax,
    functional.cross_entropy: _cross_entropy,
    functional.silu: _silu,
    functional.gelu: _gelu,
    functional.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    functional.embedding: _embedding,
}

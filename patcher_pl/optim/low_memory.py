"""Moments in fewer bytes than float32: bfloat16 with stochastic rounding, or 8 bits in blocks.

What is calculated with them is float32. Rounded to the nearest, a second moment in bfloat16 would stand
still: it changes by a thousandth per step, and neighbors are 4 to 8 thousandths apart. Rounded up or
down at random, in proportion to the distances, it is right on average.

Gupta et al., 2015, https://arxiv.org/abs/1502.02551 (stochastic rounding); Dettmers et al., 2022,
https://arxiv.org/abs/2110.02861 (8 bits in blocks), as written in torchao.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from patcher_pl.randomness import derive_seed

StateDtype = Literal["bfloat16", "8bit"]

# Weights that are updated at a time, so that what is calculated in float32 stays small beside the model.
_PIECE = 1 << 24
# As torchao does: numbers that share a scale, and the size below which a tensor stays in float32.
_BLOCK, _LEAST = 256, 4096


def zeros(like: Tensor, dtype: StateDtype, *, signed: bool) -> Tensor:
    """Returns a moment of a parameter before the first step.

    Args:
        like: The parameter, whole or this process's part.
        dtype: How it is kept; of 8 bits, torchao leaves out tensors that are small or no multiple of
            a block, and so does this: they get float32.
        signed: Whether it takes both signs, for 8 bits.

    Raises:
        ValueError: If torchao is needed, but not there.
    """
    if dtype == "bfloat16":
        return torch.zeros(like.shape, dtype=torch.bfloat16, device=like.device)
    if like.numel() < _LEAST or like.numel() % _BLOCK:
        return torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    return _optim_state_8bit().zeros(like.shape, signed, _BLOCK, like.device)


def require_installed(dtype: StateDtype | None) -> None:
    """Refuses 8 bits where torchao is missing.

    Raises:
        ValueError: If it is.
    """
    if dtype == "8bit":
        _optim_state_8bit()


def is_of_torchao(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer, or the one within it, is one of torchao's, whose moments have few bits."""
    inner = getattr(optimizer, "inner", optimizer)
    return type(inner).__module__.partition(".")[0] == "torchao"


def keeps_few_bytes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether moments have a number format of their own, whatever that of the weights."""
    return bool(getattr(optimizer, "state_dtype", None)) or is_of_torchao(optimizer)


def step_in_pieces_(
    step: Callable[[Tensor, Tensor, list[Tensor]], None],
    theta: Tensor,
    gradient: Tensor,
    moments: list[Tensor],
    seed: int,
) -> None:
    """Lets `step` update a parameter and its moments in place, the moments widened meanwhile.

    Args:
        step: Called with some of the weights, their gradients and their moments, all flat; changes
            weights and moments.
        theta: The parameter.
        gradient: Its gradient.
        moments: As `zeros` makes them.
        seed: Of the random bits that bfloat16 is rounded with: the same ones give the same result.
    """
    wide = torch.promote_types(theta.dtype, torch.float32)
    generator = torch.Generator(theta.device)
    generator.manual_seed(seed)
    flat, slopes = theta.reshape(-1), gradient.reshape(-1)
    for start in range(0, flat.numel(), _PIECE):
        here = slice(start, min(start + _PIECE, flat.numel()))
        kept = [_piece(moment, here) for moment in moments]
        widened = [_widened(one, wide) for one in kept]
        step(flat[here], slopes[here].to(wide), widened)
        for one, values in zip(kept, widened, strict=True):
            if one.dtype == torch.bfloat16:
                values = stochastically_rounded(values.float(), generator)
            one.copy_(values)
    if not theta.is_contiguous():  # Then `flat` is a copy.
        theta.copy_(flat.view(theta.shape))


def stochastically_rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """Rounds float32 to one of the two neighbors in bfloat16, each more likely the nearer it is.

    The expectation is the value itself. What is not finite stays as it is.

    Args:
        values: Any shape, float32.
        generator: Of 16 random bits per number.
    """
    bits = torch.randint(
        1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator
    )
    # The lower half of the bits is what bfloat16 cuts off; with a random half added, it carries into
    # the upper one as often as it is large.
    bits.add_(values.view(torch.int32)).bitwise_and_(-1 << 16)
    # A NaN may have bits that would carry into its sign.
    return torch.where(values.isfinite(), bits.view(torch.float32), values).bfloat16()


def seed_of(index: int, step: int) -> int:
    """Seed for one parameter at one step: an attack that is repeated or resumed rounds the same way."""
    return derive_seed(0, "stochastic rounding", index, step)


def _piece(moment: Tensor, here: slice) -> Tensor:
    if not is_traceable_wrapper_subclass(moment):
        return moment.view(-1)[here]
    state: Any = moment  # Blocks of the flat tensor, of which a piece has whole ones.
    scales = state.scale[here.start // _BLOCK : here.stop // _BLOCK]
    return type(state)(state.codes.view(-1)[here], scales, state.qmap, state.signed, torch.float32)


def _widened(moment: Any, wide: torch.dtype) -> Tensor:
    """A copy to calculate with."""
    is_8bit = bool(
        is_traceable_wrapper_subclass(moment)
    )  # Not a guard: torch types it too narrowly.
    return moment.dequantize(wide) if is_8bit else moment.to(wide, copy=True)


def _optim_state_8bit() -> Any:
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise ValueError(
            "AdamW.state_dtype must be null or bfloat16 without torchao, got '8bit'. "
            "Install it with `pip install 'patcher-pl[low-memory]'`."
        ) from error
    return OptimState8bit

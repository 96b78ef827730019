"""Whether a model keeps conversations apart that are packed into one row."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from patcher_pl.errors import ConfigError
from patcher_pl.losses.causal_lm import innermost, takes_positions
from patcher_pl.models.shards import reshard

# Tokens of a conversation that tell enough.
_LENGTH = 64
# Largest relative distance of logits that are the same but for rounding.
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3}
_TOLERANCE_OF_HALF = 5e-2


@torch.no_grad()
def require_packing(
    model: nn.Module, conversations: Sequence[Sequence[int]], device: torch.device, setting: str
) -> None:
    """Refuses a model for which a packed conversation is not the same as one on its own.

    Such are models with states that run along the row (state-space models), with position biases
    that do not go by `position_ids` (ALiBi), or with an attention that transformers makes no mask
    for. Two short forward passes find out. Of a sharded model, all processes must call it, with the
    same conversations.

    Args:
        model: Causal LM; its mode is put back.
        conversations: Token ids, of which the first two are used (at least one).
        device: Where the model computes.
        setting: What asks for packing, for the message.

    Raises:
        ConfigError: If packed logits are others.
    """
    name = type(innermost(model)).__name__
    if not takes_positions(model):
        raise ConfigError(
            f"{setting}: {name} takes no position_ids, so it cannot tell packed conversations apart. "
            "Set it to false."
        )
    first, second = (
        torch.tensor([list(ids[:_LENGTH])], device=device)
        for ids in (conversations[0], conversations[-1 if len(conversations) < 2 else 1])
    )
    was_training = model.training
    # Dropout would make two passes differ for a reason of its own.
    model.eval()
    try:
        alone = _logits(model, second, _positions(second))
        positions = torch.cat([_positions(first), _positions(second)], dim=1)
        packed = _logits(model, torch.cat([first, second], dim=1), positions)
    finally:
        model.train(was_training)
        # A forward pass without a backward pass leaves FSDP2's root gathered.
        reshard(model)
    difference = packed[:, first.shape[1] :].double() - alone.double()
    relative = float(difference.norm() / alone.double().norm())
    dtypes = {alone.dtype, next(model.parameters()).dtype}
    tolerance = max(_TOLERANCES.get(dtype, _TOLERANCE_OF_HALF) for dtype in dtypes)
    if not relative <= tolerance:
        attention = getattr(innermost(model).config, "_attn_implementation", None)
        raise ConfigError(
            f"{setting}: {name} with attention {attention!r} mixes packed conversations up: the "
            f"logits of one change by {relative:.1e} of their norm with another in front of it "
            f"(at most {tolerance:g} is rounding). Set it to false, or use attention `sdpa`."
        )


def _positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)


def _logits(model: Any, ids: Tensor, positions: Tensor) -> Tensor:
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits

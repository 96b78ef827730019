"""Which models' batches can be refilled while they decode."""

import inspect
from typing import Any

# What a model overrides where a step needs more than tokens, mask, positions and cache.
_STOCK_METHODS = (
    "generate",
    "prepare_inputs_for_generation",
    "_prepare_model_inputs",
    "_prepare_position_ids_for_generation",
    "_prepare_cache_for_generation",
    "_update_model_kwargs_for_generation",
    "_sample",
)
_ATTENTION = ("sdpa", "eager", "packed_sdpa")
_ARGUMENTS = {"input_ids", "attention_mask", "position_ids", "use_cache"}


def can_refill(model: Any) -> bool:
    """Whether `refilled_batch` can decode with `model`; otherwise its own `generate` has to be asked.

    It can where a token depends on nothing but token ids, mask and positions, and where all that is
    remembered are the keys and values of full attention: decoders that leave `generate` and the
    inputs of a step to transformers, take `position_ids`, attend with `sdpa`, `packed_sdpa` or `eager` and without
    ALiBi, and lie on one device. It cannot for sliding windows, state-space and hybrid models,
    encoder-decoders, compiled, sharded or spread models, and for code that a checkpoint brings.
    """
    from transformers import GenerationMixin, PreTrainedModel

    from patcher_pl.models.fsdp1 import uses_fsdp1
    from patcher_pl.models.peers import is_whole

    return (
        isinstance(model, PreTrainedModel)
        and isinstance(model, GenerationMixin)
        and not model.is_remote_code()
        and all(_is_stock(model, name) for name in _STOCK_METHODS)
        and set(inspect.signature(model.forward).parameters) >= _ARGUMENTS
        and cache_argument(model) is not None
        and not model.config.is_encoder_decoder
        and model.config._attn_implementation in _ATTENTION
        and not getattr(model.config, "alibi", False)
        and not model._is_stateful
        and _remembers_keys_and_values_only(model)
        and len({parameter.device for parameter in model.parameters()}) == 1
        and is_whole(model)
        and not uses_fsdp1(model)
    )


def _is_stock(model: Any, name: str) -> bool:
    from transformers import GenerationMixin

    # Methods that a later release no longer has decide nothing.
    return getattr(type(model), name, None) is getattr(GenerationMixin, name, None)


def cache_argument(model: Any) -> str | None:
    """What the forward pass calls its cache; transformers has changed the name."""
    takes = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in takes), None)


def _remembers_keys_and_values_only(model: Any) -> bool:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)

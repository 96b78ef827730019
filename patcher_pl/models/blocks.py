"""The parts of a decoder-only transformer, found by what they are and not by their names."""

from typing import TYPE_CHECKING, Any

from torch import nn

from patcher_pl.errors import ConfigError
from patcher_pl.models.peers import gathered_here, is_spread, require_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def blocks_of(model: "PreTrainedModel") -> list[nn.Module]:
    """Returns the transformer blocks in order: the list of as many modules as the config has layers.

    Raises:
        ConfigError: If there is no such list.
    """
    blocks = find_blocks(model)
    if not blocks:
        num_layers = model.config.get_text_config().num_hidden_layers
        raise _not_found(model, f"list of {num_layers} blocks")
    return blocks


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Like `blocks_of`; an empty list where there are none."""
    return list(_block_list(model) or [])


def attention_of(block: nn.Module) -> nn.Module:
    """Returns what mixes the positions of a block: its child with a place (`layer_idx`) in the cache.

    Raises:
        ConfigError: If there is none.
    """
    for module in block.modules():
        if module is not block and hasattr(module, "layer_idx"):
            return module
    raise _not_found(block, "attention: a module with a `layer_idx`")


def feed_forward_of(block: nn.Module) -> nn.Module:
    """Returns what ends a block: its last child with a matrix, which norms have not.

    Raises:
        ConfigError: If there is none.
    """
    found = [
        child
        for child in block.children()
        if any(parameter.ndim >= 2 for parameter in child.parameters())
    ]
    if not found:
        raise _not_found(block, "layers with a weight matrix")
    return found[-1]


def final_norm_of(model: "PreTrainedModel") -> nn.Module:
    """Returns the norm between the last block and the output head; the identity where there is none.

    It is the last module beside the blocks whose weights are all vectors.
    """
    blocks = _block_list(model)
    for module in model.modules() if blocks is not None else ():
        beside = list(module.children())
        if not any(child is blocks for child in beside):
            continue
        for child in reversed(beside):
            shapes = [parameter.ndim for parameter in child.parameters()]
            if child is not blocks and shapes and max(shapes) == 1:
                return child
    return nn.Identity()


def _block_list(model: nn.Module) -> nn.ModuleList | None:
    config: Any = getattr(model, "config", None)
    if config is None:  # Not of transformers.
        return None
    num_layers = config.get_text_config().num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((found for found in lists if len(found) == num_layers), None)


def _not_found(module: nn.Module, what: str) -> ConfigError:
    return ConfigError(
        f"LanguageModel.path: {type(module).__name__} has no {what}, which this defense works on. "
        "Use a decoder-only transformer, or a defense that takes any causal LM, such as Patcher."
    )


def untied_embeddings(model: "PreTrainedModel") -> nn.Embedding:
    """Returns the input embeddings, after giving a tied output head a copy of its own.

    A change of the embeddings would otherwise change what the model says at every position. The
    model computes the same as before.
    """
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is not None and head.weight is embeddings.weight:
        with gathered_here(model):
            require_whole(model, "A change of the embeddings that the output head shares")
            own = nn.Parameter(embeddings.weight.detach().clone())
            bias = None if head.bias is None else nn.Parameter(head.bias.detach().clone())
        if is_spread(model):
            # Every process has all of the new head: what FSDP2 holds of the old one stays with it.
            head = nn.Linear(head.in_features, head.out_features, device="meta")
            head.bias = bias
            model.set_output_embeddings(head)
        head.weight = own
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    return embeddings

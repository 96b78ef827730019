"""What an architecture says of its size: how many tokens it reads at once, how many layers it has."""

from copy import deepcopy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Transformers maps most names to the first. Recurrent models, and those that go on for as long as
# memory lasts, have none.
_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


def context_length(config: "PretrainedConfig") -> int | None:
    """Longest sequence that the model reads, its answer included (tokens); None where it does not say."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in _NAMES)
    return next((length for length in found if isinstance(length, int) and length > 0), None)


def with_layers(config: "PretrainedConfig", num_layers: int) -> "PretrainedConfig":
    """Returns the same architecture with its first layers alone; never more than it has."""
    shallow = deepcopy(config)
    text = shallow.get_text_config()
    text.num_hidden_layers = min(num_layers, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    return shallow

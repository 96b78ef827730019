"""How many tokens a model reads at once."""

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

"""Input embeddings on their own, also where a model shares them with its output head."""

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def untied_embeddings(model: "PreTrainedModel") -> nn.Embedding:
    """Returns the input embeddings, after giving a tied output head a copy of its own.

    A change of the embeddings would otherwise change what the model says at every position. The
    model computes the same as before.
    """
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is not None and head.weight is embeddings.weight:
        head.weight = nn.Parameter(embeddings.weight.detach().clone())
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    return embeddings

"""What the layers of a model say of answers, which SEAM and RepNoise make worse."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from patcher_pl.losses import answer_cross_entropy
from patcher_pl.models.blocks import final_norm_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUTSIDE_OF_FORWARD = (
    "it reads hidden states through the output head outside of the model's forward pass, when that "
    "layer's weights are not gathered"
)


def layer_losses(
    model: "PreTrainedModel", hidden_states: Sequence[Tensor], labels: Tensor
) -> list[Tensor]:
    """Cross-entropy of answers as read off each hidden state through last norm and output head.

    In nats per answer token. The logits of one hidden state at a time are in memory: they are
    computed once more on the way back. The last layer needs no reading: it is what logits are of.
    """
    norm = final_norm_of(model)
    head: Any = model.get_output_embeddings()

    def loss_from(hidden: Tensor) -> Tensor:
        return answer_cross_entropy(head(norm(hidden)), labels)

    return [checkpoint(loss_from, hidden, use_reentrant=False) for hidden in hidden_states]

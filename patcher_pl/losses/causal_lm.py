"""Next-token cross-entropy over answer tokens: the L of every formula in this codebase."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from patcher_pl.types import Batch

IGNORE_INDEX = -100


def answer_cross_entropy(
    logits: Float[Tensor, "batch time vocab"], labels: Int[Tensor, "batch time"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the answer tokens of a batch, in nats per token.

    Position t predicts label t + 1; labels of -100 (prompt and padding) do not count. Half
    precision logits are raised to float32 first.

    Raises:
        ValueError: If no label of the batch counts: the mean would be 0 / 0.
    """
    targets = labels[:, 1:]
    if not bool((targets != IGNORE_INDEX).any()):
        raise ValueError(
            "answer_cross_entropy needs at least one answer token, got none in the batch."
        )
    predictions = logits[:, :-1]
    if predictions.dtype in (torch.float16, torch.bfloat16):
        predictions = predictions.float()
    return functional.cross_entropy(
        predictions.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX
    )


def causal_lm_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """L(theta) on one batch: forward pass of a Hugging Face causal LM, then `answer_cross_entropy`.

    Where processes share a batch, the mean of this over them is the mean over all answer tokens.
    """
    output = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    )
    loss = answer_cross_entropy(output.logits, batch["labels"])
    return loss * batch["loss_weight"] if "loss_weight" in batch else loss

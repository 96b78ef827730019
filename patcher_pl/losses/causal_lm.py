"""Next-token cross-entropy over answer tokens: the L of every formula in this codebase."""

import inspect
from functools import lru_cache
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import functional

from patcher_pl.losses.lean_cross_entropy import lean_cross_entropy
from patcher_pl.types import HALF_PRECISION, IGNORE_INDEX, Batch, is_packed

_NO_ANSWER = "{} needs at least one answer token, got none in the batch."


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
        raise ValueError(_NO_ANSWER.format("answer_cross_entropy"))
    predictions = logits[:, :-1]
    if predictions.dtype in HALF_PRECISION:
        predictions = predictions.float()
    return functional.cross_entropy(
        predictions.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX
    )


def causal_lm_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """L(theta) on one batch: forward pass of a Hugging Face causal LM, then `answer_cross_entropy`.

    Its gradient can be taken once: packed batches need much less memory then, see
    `lean_cross_entropy`. Where processes share a batch, the mean of this over them is the mean over
    all answer tokens.
    """
    if not is_packed(batch):
        return differentiable_loss(model, batch)
    return _weighted(lean_cross_entropy(*_packed_predictions(model, batch)), batch)


def differentiable_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """The same as `causal_lm_loss`, for a gradient that is differentiated again."""
    if is_packed(batch):
        loss = functional.cross_entropy(*_packed_predictions(model, batch, raised=True))
    else:
        loss = answer_cross_entropy(model(**model_inputs(batch)).logits, batch["labels"])
    return _weighted(loss, batch)


def model_inputs(batch: Batch) -> dict[str, Any]:
    """What a Hugging Face causal LM is called with, so that no conversation sees another one."""
    inputs = {"input_ids": batch["input_ids"], "use_cache": False}
    if "position_ids" in batch:
        # No mask: transformers and its attention kernels read from the positions where one
        # conversation ends, but only if there is none.
        return {**inputs, "position_ids": batch["position_ids"]}
    return {**inputs, "attention_mask": batch["attention_mask"]}


def _packed_predictions(
    model: nn.Module, batch: Batch, *, raised: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits of the answer tokens and the tokens themselves, both in order."""
    assert "logits_to_keep" in batch
    kept = batch["logits_to_keep"]
    if not len(kept):
        raise ValueError(_NO_ANSWER.format("causal_lm_loss"))
    inputs = model_inputs(batch)
    selects = keeps_logits(model)
    if selects:
        inputs["logits_to_keep"] = kept
    # Not `[0]`, whose backward pass fills a second buffer of that size.
    logits = model(**inputs).logits.squeeze(0)
    # Models without the argument make the logits of all positions; what is not needed is dropped
    # here.
    if not selects:
        logits = logits[kept]
    if raised and logits.dtype in HALF_PRECISION:
        logits = logits.float()
    return logits, batch["input_ids"][0, kept + 1]


def _weighted(loss: Tensor, batch: Batch) -> Tensor:
    return loss * batch["loss_weight"] if "loss_weight" in batch else loss


def keeps_logits(model: nn.Module) -> bool:
    """Whether `logits_to_keep` may be handed to the model; with a large vocabulary it saves most."""
    return _takes(type(innermost(model)), "logits_to_keep")


def takes_positions(model: nn.Module) -> bool:
    """Whether `position_ids` may be handed to the model."""
    return _takes(type(innermost(model)), "position_ids")


def innermost(model: Any) -> Any:
    """Returns the Hugging Face model within what FSDP1 and PEFT put around it."""
    while isinstance(model, FullyShardedDataParallel):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@lru_cache
def _takes(kind: type[nn.Module], name: str) -> bool:
    return name in inspect.signature(kind.forward).parameters

"""How far a model has moved from another one: by its predictions, or by its hidden states."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from patcher_pl.losses.causal_lm import model_inputs
from patcher_pl.types import IGNORE_INDEX, Batch


def outputs_of(model: nn.Module, batch: Batch, *, hidden_states: bool = True) -> Any:
    """Forward pass of a Hugging Face causal LM: logits and, if asked for, hidden states."""
    return model(**model_inputs(batch), output_hidden_states=hidden_states)


def predicts_answers(labels: Int[Tensor, "batch time"]) -> Bool[Tensor, "batch time"]:
    """Where the next token is one of an answer; the last position predicts nothing."""
    return functional.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))


def answer_log_likelihoods(
    logits: Float[Tensor, "batch time vocab"], labels: Int[Tensor, "batch time"]
) -> Float[Tensor, "answers vocab"]:
    """Log-likelihoods (nats) with which answer tokens are predicted, in float32 at least."""
    predictions, counts = logits[:, :-1], labels[:, 1:] != IGNORE_INDEX
    # Where all count, as on the tensors without values of a rehearsal, there is nothing to leave out.
    chosen = predictions.flatten(0, 1) if bool(counts.all()) else predictions[counts]
    return chosen.to(torch.promote_types(chosen.dtype, torch.float32)).log_softmax(-1)


def mean_divergence(
    log_p: Float[Tensor, "tokens vocab"], log_q: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, ""]:
    """Mean over tokens of KL(p || q), in nats per token, from log-likelihoods."""
    return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def mean_state_distance(
    states: Sequence[Float[Tensor, "batch time width"]],
    kept: Sequence[Float[Tensor, "batch time width"]],
    mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, ""]:
    """Mean ||h - h_kept||_2 over the tokens of a mask, and over embeddings and layers.

    References:
        TAR's representation loss: Tamirisa et al., 2024, https://arxiv.org/abs/2408.00761.
    """
    pairs = zip(states, kept, strict=True)
    return torch.stack([mean_where(mask, (h - base).norm(dim=-1)) for h, base in pairs]).mean()


def mean_where(chosen: Bool[Tensor, "*n"], values: Float[Tensor, "*n"]) -> Float[Tensor, ""]:
    """Mean of the values that are chosen."""
    return (values * chosen).sum() / chosen.sum()

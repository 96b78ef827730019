"""Cross-entropy that keeps one buffer of logits instead of three, for large vocabularies."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patcher_pl.types import HALF_PRECISION

# Logits that are worked on at once (count). Their log-probabilities are all there is beside the
# logits, in float32; smaller chunks cost more launches than they save.
_CHUNK_ON_CPU = 2**21
_CHUNK = 2**25


def lean_cross_entropy(
    logits: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats per row, whose gradient can be taken once.

    The forward pass turns `logits` in place into their own gradient, so that nothing else of that
    size is ever there; plain cross-entropy holds logits, log-probabilities and gradient. Use it on
    logits that nobody reads afterwards. Where no gradient is wanted they stay as they are.

    Half precision is summed up in float32, a few rows at a time.

    Raises:
        RuntimeError: In the backward pass, if the gradient is to be differentiated or was taken
            before, or if the logits were saved for another backward pass. In the forward pass, under
            forward-mode or functional derivatives.

    References:
        Hsu et al., 2024, Liger Kernel, https://arxiv.org/abs/2410.10989, section 3.2.
    """
    if torch.is_grad_enabled() and logits.requires_grad:
        return _LeanCrossEntropy.apply(logits, targets)  # type: ignore[return-value]
    return _total(logits, targets, keep_gradient=False) / len(targets)


class _LeanCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        # Shares memory and version: a backward pass that had saved the logits fails.
        gradient = logits.detach()
        loss = _total(gradient, targets, keep_gradient=True) / len(targets)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # `once_differentiable` would say nothing where `grad_output` is a constant, as it mostly is.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "lean_cross_entropy has no second derivative, and its gradient was asked for with "
                "create_graph. Use differentiable_loss."
            )
        # In place: autograd refuses to unpack it a second time.
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_output / len(gradient)), None


def _total(logits: Tensor, targets: Tensor, *, keep_gradient: bool) -> Tensor:
    """Sum of the cross-entropies; leaves softmax minus one-hot in `logits` if asked to."""
    vocab_size = logits.shape[1]
    half = logits.dtype in HALF_PRECISION
    total = torch.zeros((), dtype=torch.float32 if half else logits.dtype, device=logits.device)
    in_chunk = _CHUNK_ON_CPU if logits.device.type == "cpu" else _CHUNK
    size = max(1, in_chunk // vocab_size)
    for chunk, wanted in zip(logits.split(size), targets.split(size), strict=True):
        likelihoods = torch.log_softmax(chunk, dim=-1, dtype=total.dtype)
        at = wanted.unsqueeze(1)
        total -= likelihoods.gather(1, at).sum()
        if keep_gradient:
            likelihoods.exp_()
            likelihoods.scatter_add_(1, at, torch.full_like(at, -1, dtype=total.dtype))
            # Softmax minus one-hot: the gradient of the sum, in the place of the logits that made
            # it.
            chunk.copy_(likelihoods)
    return total

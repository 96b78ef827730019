"""Perturbed hidden embeddings: what Vaccine and T-Vaccine share."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from patcher_pl.defenses.step import Step
from patcher_pl.losses import differentiable_loss
from patcher_pl.randomness import RandomState
from patcher_pl.types import Batch, count_tokens


@contextmanager
def shifted_outputs(
    modules: Sequence[nn.Module], shifts: dict[nn.Module, Tensor]
) -> Iterator[None]:
    """Adds `shifts` to the outputs of modules in forward passes within the block.

    Backward passes belong into the block as well: activation checkpointing calls the modules again.

    Args:
        modules: Whose outputs are shifted; of a tuple, the first.
        shifts: By module. One that is missing is set to zeros, by which gradients can be taken.
    """

    def shift(module: nn.Module, _: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        if module not in shifts:
            shifts[module] = torch.zeros_like(first, requires_grad=True)
        moved = first + shifts[module]
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handles = [module.register_forward_hook(shift) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def output_gradients(
    step: Step, modules: Sequence[nn.Module], batch: Batch
) -> tuple[list[Tensor], Tensor]:
    """Returns the gradient of a batch's loss by the output of every module, and the loss.

    Counts as one gradient evaluation. Every `.grad` stays as it is.
    """
    shifts: dict[nn.Module, Tensor] = {}
    with shifted_outputs(modules, shifts):
        loss = differentiable_loss(step.model, batch)
        gradients = torch.autograd.grad(loss, [shifts[module] for module in modules])
    step.cost.add(num_tokens=count_tokens(batch))
    return list(gradients), loss.detach()


def add_perturbed_gradients(
    step: Step, modules: Sequence[nn.Module], rho: float, batch: Batch, share: float
) -> Mapping[str, Tensor]:
    """Adds `share` times the gradient of the loss under the worst perturbation of length `rho`.

        e_l -> e_l + rho g_l / ||(g_1, ..., g_L)||,      g_l = gradient of the loss by e_l

    Args:
        step: Whose model it is.
        modules: Their outputs are the e_l.
        rho: Length of all perturbations of a batch together, over the processes that share it.
        batch: What the loss is of. Dropout falls the same way in both passes.
        share: Weight of the gradient.

    Returns:
        Losses to log, and the norm that was divided by.
    """
    dropout = RandomState.capture(batch["input_ids"].device)
    gradients, loss_safe = output_gradients(step, modules, batch)
    # Not of the model's own parameters: FSDP2 leaves gathered ones behind.
    own, shards = norms_of(gradients).square().sum(), step.trained_weights.shards
    norm = shards.total_of_batches(own).sqrt()
    # Where the loss is flat there is no worst direction.
    scale = torch.where(norm > 0, rho / norm, torch.zeros_like(norm))
    pairs = zip(modules, gradients, strict=True)
    shifts = {module: (gradient * scale).to(gradient.dtype) for module, gradient in pairs}
    dropout.restore()
    with shifted_outputs(modules, shifts):
        loss_perturbed = differentiable_loss(step.model, batch)
        step.backward(share * loss_perturbed, batch)
    return {
        "loss_safe": loss_safe,
        "loss_perturbed": loss_perturbed.detach(),
        "perturbation_gap": loss_perturbed.detach() - loss_safe,
        # Losses here are means over this process's rows, of which the step's loss is the mean.
        "embedding_grad_norm": norm / shards.num_peers,
    }


def norms_of(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of every tensor, in float32 at least."""
    wide = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in gradients]
    return torch.stack([torch.linalg.vector_norm(tensor) for tensor in wide])

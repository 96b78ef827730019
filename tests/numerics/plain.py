"""Pieces from which a paper's update is written down once more, by plain autograd on copies."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from patcher_pl.types import Batch

Vector = Sequence[Tensor]


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of the answer tokens."""
    likelihoods = logits.log_softmax(-1)
    answers = (batch["labels"] != -100).nonzero().tolist()
    terms = [-likelihoods[row, time - 1, batch["labels"][row, time]] for row, time in answers]
    return torch.stack(terms).mean()


def outputs(model: nn.Module, batch: Batch):
    return model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        output_hidden_states=True,
    )


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(outputs(model, batch).logits, batch)


def gradient(model: nn.Module, batch: Batch, loss: Callable = loss_of) -> list[Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(loss(model, batch), trained))


def moved(model: nn.Module, vector: Vector) -> nn.Module:
    copied = copy.deepcopy(model)
    trained = [parameter for parameter in copied.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter, change in zip(trained, vector, strict=True):
            parameter.copy_(parameter + change)
    return copied


def dot(one: Vector, other: Vector) -> float:
    return float(sum((a * b).sum() for a, b in zip(one, other, strict=True)))


def scaled(vector: Vector, factor: float) -> list[Tensor]:
    return [factor * part for part in vector]


def plus(*vectors: Vector) -> list[Tensor]:
    return [torch.stack(parts).sum(0) for parts in zip(*vectors, strict=True)]


def unit(vector: Vector) -> list[Tensor]:
    return scaled(vector, dot(vector, vector) ** -0.5)


def descended(
    model: nn.Module, vector: Vector, lr: float, limit: float | None, norms: list[float]
) -> nn.Module:
    """The model after one step of gradient descent along the clipped gradient."""
    norm = dot(vector, vector) ** 0.5
    norms.append(norm)
    factor = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
    return moved(model, scaled(vector, -lr * factor))


def relative_error(ours: nn.Module, theirs: nn.Module, start: nn.Module) -> float:
    """How far apart two models are, by the way that one of them went."""
    apart, way = 0.0, 0.0
    for one, other, begun in zip(
        ours.parameters(), theirs.parameters(), start.parameters(), strict=True
    ):
        apart += float((one - other).detach().square().sum())
        way += float((other - begun).detach().square().sum())
    return (apart / way) ** 0.5

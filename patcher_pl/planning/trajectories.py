"""How the need of a hypergradient grows with the length of the attack, found on a toy."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from patcher_pl.attackers import Attacker
from patcher_pl.hypergradients import Hypergradient
from patcher_pl.models import Weights
from patcher_pl.planning.instruments import instrumented
from patcher_pl.planning.parts import HYPERGRADIENT
from patcher_pl.planning.tracker import Tracker
from patcher_pl.types import Batch

_NUM_WEIGHTS = 1024


@dataclass(frozen=True, kw_only=True)
class EstimateCost:
    """Cost of one estimate, independent of the model.

    Args:
        peak_weights: Highest need, in copies of the weights.
        gradient_evaluations: As `HypergradientEstimate` counts them.
    """

    peak_weights: float
    gradient_evaluations: float


def estimate_cost(hypergradient: Hypergradient, attacker: Attacker, num_steps: int) -> EstimateCost:
    """Runs the estimator for real on a vector of weights with a quadratic loss.

    Args:
        hypergradient: Estimator; its trajectory is to be kept beside the model.
        attacker: Whose optimizer, clipping and schedule are used; its `num_steps` are not.
        num_steps: Attack steps (count).
    """
    attack = replace(attacker, num_steps=num_steps)  # type: ignore[type-var]
    inner = replace(attack.inner_problem(_batches()), loss_function=_quadratic)
    model, tracker = _Toy(), Tracker()
    weights = Weights(model)
    tracker.label_weights(model.parameters())
    with instrumented(tracker, None, hypergradient, multi_tensor=False), tracker:
        found = hypergradient.estimate(
            model, weights, inner, lambda module: _quadratic(module, inner.batches[0])
        )
    highest = max(sum(parts.values()) for parts in tracker.peaks()[HYPERGRADIENT])
    return EstimateCost(
        peak_weights=highest / (_NUM_WEIGHTS * model.theta.itemsize),
        gradient_evaluations=found.gradient_evaluations,
    )


class _Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.linspace(0.5, 1.5, _NUM_WEIGHTS))


def _quadratic(model: nn.Module, batch: Batch) -> Tensor:
    assert isinstance(model.theta, Tensor)
    return 0.5 * model.theta.square().mean()


def _batches() -> Iterator[Batch]:
    ones = torch.ones(1, 2, dtype=torch.long)
    while True:
        yield Batch(input_ids=ones, attention_mask=ones, labels=ones)

"""What a plan asks of a defense that attacks its model, and how the need grows with the attack."""

from copy import deepcopy
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from patcher_pl.attackers import AttackDistribution, Kind
from patcher_pl.defenses import Defense
from patcher_pl.defenses.attack_source import AlongTheWay, AttackSource, Concurrent
from patcher_pl.errors import ConfigError
from patcher_pl.hypergradients import FirstOrder
from patcher_pl.hypergradients.trajectories.shelf import Shelf
from patcher_pl.models import Weights
from patcher_pl.optim import DifferentiableOptimizer
from patcher_pl.planning.architecture import UnloadedLora
from patcher_pl.planning.tracker import ATTACK, HYPERGRADIENT, Part, Tracker
from patcher_pl.types import Batch

NUM_SFT_STEPS = 1  # Steps of a rehearsal before the first attack.
_NUM_TOY_WEIGHTS = 1024
# Settings whose largest value needs the most memory.
_LARGEST = ("batch_size",)


def attacks_of(defense: Defense) -> AttackSource | None:
    """Returns where attacked weights come from in rounds; None where every step is like the others.

    Raises:
        ConfigError: If they run in other processes.
    """
    source = defense.attack_source
    if isinstance(source, Concurrent):
        raise ConfigError(
            f"{type(defense).__name__}.attacker: `plan` knows attacks in the defender's process only, got a "
            "ConcurrentAttacker. Plan with a member of its population as `attacker` to see what "
            "attacks and the defender's steps need."
        )
    # What attacks within each step is rehearsed with the step.
    return None if isinstance(source, AlongTheWay) else source


def is_first_order(attacks: AttackSource) -> bool:
    """Whether attacks are held fixed, instead of differentiated."""
    return isinstance(attacks.hypergradient, FirstOrder)


def with_short_attacks(defense: Defense, num_steps: int) -> Defense:
    """Returns a copy whose first attack follows `NUM_SFT_STEPS` steps, and the next one each step."""
    defense = deepcopy(defense)
    defense.accumulate_grad_batches = 1
    attacks = attacks_of(defense)
    if attacks is not None:
        attacks.attacker = _short(attacks.attacker, num_steps)
        attacks.hypergradient = _beside_model(attacks.hypergradient)
        attacks.num_sft_steps, attacks.refresh_every = NUM_SFT_STEPS, 1
        # What is measured now and then needs memory just then: a rehearsal of three steps must meet
        # it.
        attacks.trust_every = attacks.trust_every and 1
    return defense


def num_attacks_of(attacks: AttackSource | None) -> int:
    """Attacks until all there ever is is there: every kind, and one more to be begun with that."""
    return 2 if attacks is None else max(2, len(attacks.attacker.kind_names) + 1)


def _short(attacker: Any, num_steps: int) -> Any:
    """The same attacks in few steps: with the largest batches, and in turn."""
    if isinstance(attacker, AttackDistribution):
        # As long as each other, so that every kind has its share of what is measured.
        num_steps = max(num_steps, attacker.num_vectors)
        kinds = [
            Kind(
                attacker=_short(kind.attacker, num_steps),
                label=kind.name,
                space={name: [max(kind.space[name])] for name in _LARGEST if name in kind.space},
            )
            for kind in attacker.kinds
        ]
        return AttackDistribution(kinds=kinds)
    # As many vectors as configured, from as many steps at least.
    num_vectors = attacker.num_vectors
    last = max(num_steps, num_vectors)
    points = list(range(last - num_vectors + 1, last + 1)) if num_vectors > 1 else None
    carry = attacker.carry and replace(attacker.carry, restart_every=None, restart_probability=None)
    return replace(
        attacker,
        num_steps=last,
        num_warmup_steps=0,
        vector_steps=points,
        num_random_points=None,
        growth=None,
        carry=carry,
        lora=attacker.lora and UnloadedLora(**vars(attacker.lora)),
    )


def sites_of(attacks: AttackSource | None) -> dict[Any, Part | str]:
    """Where tensors of a part or phase come into being; see `Tracker`."""
    sites: dict[Any, Part | str] = {
        Weights.snapshot: Part.SAVED_WEIGHTS,
        Weights.shifted: Part.SAVED_WEIGHTS,
        Weights.replaced: Part.SAVED_WEIGHTS,
        Weights.difference: Part.ATTACK_VECTOR,
        Weights.update_of: Part.ATTACK_VECTOR,
        DifferentiableOptimizer.init: Part.ATTACKER_OPTIMIZER,
        Shelf.put: Part.TRAJECTORY,
    }
    if attacks is not None:
        sites[type(attacks.attacker.draw(0, 0).attacker).attack] = ATTACK
        sites[type(attacks.hypergradient).estimate] = HYPERGRADIENT
    return sites


def toy_estimate(attacks: AttackSource, num_steps: int) -> tuple[float, float]:
    """Runs the estimator for real, with an attack of so many steps on a vector and a quadratic loss.

    Returns:
        Highest need, in copies of the weights, and gradient evaluations: both independent of the model.
    """
    ones = torch.ones(1, 2, dtype=torch.long)
    batches = repeat(Batch(input_ids=ones, attention_mask=ones, labels=ones))
    attacker = _short(attacks.attacker.draw(0, 0).attacker, num_steps)
    inner = replace(attacker.inner_problem(batches), loss_function=_quadratic)
    model, tracker = nn.Module(), Tracker(sites_of(attacks))
    model.theta = nn.Parameter(torch.linspace(0.5, 1.5, _NUM_TOY_WEIGHTS))
    tracker.label(model.parameters(), Part.PARAMETERS)
    weights, estimator = Weights(model), _beside_model(attacks.hypergradient)
    with tracker:
        found = estimator.estimate(model, weights, inner, _quadratic)
    highest = max(sum(parts.values()) for parts in tracker.peaks()[HYPERGRADIENT])
    return highest / (_NUM_TOY_WEIGHTS * model.theta.itemsize), found.gradient_evaluations


def _quadratic(model: Any, batch: Batch | None = None) -> Tensor:
    return 0.5 * model.theta.square().mean()


def _beside_model(hypergradient: Any) -> Any:
    """The estimator with its trajectory where it can be measured."""
    store = getattr(hypergradient, "store", None)
    return replace(hypergradient, store=replace(store, device="model")) if store else hypergradient

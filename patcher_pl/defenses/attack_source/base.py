"""The interface of a source of attacked weights, and what every source says about an attack."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patcher_pl.attackers import Attacker, Carried, DrawnAttack
from patcher_pl.defenses.attack_source.carried_state import add_carried, read_carried
from patcher_pl.defenses.outer_loss import Term, add_gradients_here
from patcher_pl.defenses.saved_tensors import add_vectors, own_parts, read_vectors
from patcher_pl.defenses.step import Step
from patcher_pl.errors import ConfigError
from patcher_pl.hypergradients import FirstOrder, Hypergradient
from patcher_pl.models import Sharding, Weights

Vector = Sequence[Tensor]


class AttackSource(ABC):
    """Where the attacked weights of a defense come from.

    A defense that has one gives it the turn before every step (`prepare`), asks it for the gradient
    of its outer loss at the attacked weights of that step (`add_gradients`), and lets it keep in
    checkpoints what a run needs to go on.

    Args:
        attacker: The simulated attack. It always gets all weights of the model, adapters or not.
        refresh_every: Defender steps for which an attack is used (k2, count).
        num_sft_steps: Defender steps before the first attack (count).
    """

    hypergradient: Hypergradient = FirstOrder()
    """How the outer loss is differentiated through the attack."""

    trust_every: int | None = None
    """Fresh estimates from one measurement of their trust to the next; None never measures it."""

    def __init__(self, attacker: Attacker, *, refresh_every: int, num_sft_steps: int) -> None:
        self.attacker = attacker
        self.refresh_every = refresh_every
        self.num_sft_steps = num_sft_steps
        self.num_attacks = 0
        self.vectors: Sequence[Vector] = []
        """Attack vectors made in this process, that of the end of the attack last."""
        self.carried: dict[str, Carried] = {}
        """Where attacks ended that later ones go on from, by their kind."""

    @abstractmethod
    def prepare(self, step: Step) -> None:
        """Does what is due before a step: attacks, or picks up what was attacked elsewhere.

        Raises:
            RunInterrupted: If the run is to stop; the step is undone then.
            ConfigError: If an attack diverged.
        """

    @abstractmethod
    def has_attacked(self, step: Step) -> bool:
        """Whether there are attacked weights in this step."""

    @abstractmethod
    def add_gradients(self, step: Step, terms: Sequence[Term], share: float) -> dict[str, Tensor]:
        """Adds `share` times the gradient of the terms' sum at the attacked weights of this step.

        Args:
            step: In which there are such weights.
            terms: The outer loss on one batch.
            share: Of this batch in the step.

        Returns:
            Losses to log, by the names of the terms.
        """

    def require_several_processes(self, owner: str) -> None:  # noqa: B027  # Most can.
        """Refuses what several processes cannot do together, whatever each of them holds.

        Raises:
            ConfigError: If there is such a setting of `owner`, the class of the defense.
        """

    def require_shardable(self, owner: str, sharding: Sharding) -> None:
        """Refuses what cannot be done with sharded weights.

        Raises:
            ConfigError: If there is such a setting of `owner`, the class of the defense.
        """
        if not self.attacker.works_sharded:
            raise ConfigError(
                f"{owner}.attacker must work on sharded weights, got {self.attacker}. Attack every "
                "weight or adapters (`trains: all`), or train on one device."
            )

    def finish(self, step: Step, take_step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Lets the optimizer take the step, and looks at what it did if that is asked for."""
        return take_step()

    def open(self, step: Step) -> None:
        """Begins a run, or goes on with one; weights are where they will stay."""
        # Those of a checkpoint were read before.
        placed = step.all_weights.placed
        self.vectors = [placed(vector) for vector in self.vectors]
        self.carried = {
            kind: replace(one, vector=placed(one.vector)) for kind, one in self.carried.items()
        }

    def close(self) -> None:  # noqa: B027  # Most have nothing that outlives a run.
        """Ends a run."""

    def release(self) -> None:
        """Lets go of everything as large as the weights."""
        self.vectors, self.carried = [], {}

    def save(self, checkpoint: dict[str, Any], weights: Weights) -> None:
        """Adds to a checkpoint what a run needs to go on within a round."""
        checkpoint["defense"]["num_attacks"] = self.num_attacks
        add_vectors(checkpoint, "attack_vector", weights, self.vectors)
        add_carried(checkpoint, weights, self.carried)

    def load(self, checkpoint: dict[str, Any], weights: Weights, path: Any) -> None:
        """Goes on with the attack vectors of a checkpoint, whichever source they came from.

        Args:
            checkpoint: As read.
            weights: Owner of every weight.
            path: Where it was read from.
        """
        state = checkpoint["defense"]
        self.num_attacks = state["num_attacks"]
        self.vectors = read_vectors(checkpoint, "attack_vector", weights, path)
        self.carried = read_carried(checkpoint, weights, path)
        for slot in state.get("remote", {}).get("slots", [])[:1]:
            self.vectors = [own_parts(slot["vector"], weights)]

    def is_due(self, step: Step) -> bool:
        """Whether a new attack is wanted before this step."""
        since = step.number - self.num_sft_steps
        return since >= 0 and since // self.refresh_every >= self.num_attacks


def add_gradients_at(
    step: Step, vectors: Sequence[Vector], terms: Sequence[Term], share: float
) -> dict[str, Tensor]:
    """Adds the gradients of terms at theta + v, applied to theta; their mean over the vectors.

    First order: the Jacobian of the attack is taken to be the identity.
    """
    found: dict[str, list[Tensor]] = {term.name: [] for term in terms}
    for vector in vectors:
        # Forward and backward pass both lie within: the backward pass reads the weights again.
        with step.all_weights.shifted(vector):
            losses = add_gradients_here(step, terms, share / len(vectors))
        for name, loss in losses.items():
            found[name].append(loss)
    return {name: torch.stack(losses).mean() for name, losses in found.items()}


def account_for_attack(
    step: Step,
    drawn: DrawnAttack,
    *,
    norm: float,
    losses: Sequence[float],
    num_tokens: Sequence[int],
    steps_before: int,
    num_steps_from_theta: int,
    tag: str = "attack",
) -> None:
    """Counts and logs an attack whose vector is used from now on.

    Args:
        step: Before which it is due.
        drawn: What it was.
        norm: Of the attack vector, as `checked_norm` found it.
        losses: Mean cross-entropy before every attack step (nats per answer token).
        num_tokens: Tokens of every attack step's batch, padding excluded.
        steps_before: Steps of the attacks before it (count).
        num_steps_from_theta: Steps since an attack began at the defender's weights (count).
        tag: Where it is shown.
    """
    evaluations = 1
    if drawn.data.batch_size is not None:
        evaluations = drawn.data.evaluations_per_step(step.data.batch_sizes[1])
    for count in num_tokens:
        step.cost.add(num_tokens=count, gradient_evaluations=evaluations)
    summary = {"loss": losses[-1], "loss_before": losses[0], "vector_norm": norm}
    if drawn.is_carried:
        summary["steps_from_theta"] = num_steps_from_theta
    step.log({f"{tag}/{key}": value for key, value in summary.items()})
    if drawn.kind:
        shown = {
            name: value for name, value in drawn.settings.items() if not isinstance(value, str)
        }
        step.log(
            {f"{tag}_{drawn.kind}/{key}": value for key, value in {**shown, **summary}.items()}
        )
    for index, loss in enumerate(losses, start=steps_before + 1):
        step.log({f"{tag}/loss_by_attack_step": loss}, index)


def checked_norm(step: Step, vector: Vector) -> float:
    """Returns the norm of an attack vector.

    Raises:
        ConfigError: If the attack diverged.
    """
    norm = float(step.all_weights.shards.norm(vector))
    if not math.isfinite(norm):
        raise ConfigError(
            f"{step.owner}.attacker: the simulated attack diverged at defender step {step.number} "
            f"(norm of the attack vector: {norm}). Lower `attacker.optimizer.lr` or set "
            "`attacker.max_grad_norm`."
        )
    return norm

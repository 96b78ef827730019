"""Attacks in the defender's process, and the attack vectors that came of the newest."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from patcher_pl.attackers import Combine, combined
from patcher_pl.defenses.attack_report import account_for_attack, checked_norm
from patcher_pl.defenses.saved_tensors import add_vectors, own_parts, read_vectors
from patcher_pl.errors import RunInterrupted

if TYPE_CHECKING:
    from patcher_pl.defenses.patcher import Patcher


class LocalAttacks:
    """The attack vectors in use, one from every point of the attack that the attacker was asked for.

    Args:
        defense: Whose model is attacked.
        combine: Which of the vectors a defender step is taken against.
    """

    def __init__(self, defense: "Patcher", combine: Combine) -> None:
        self.vectors: Sequence[Sequence[Tensor]] = []  # That of the end of the attack last.
        self._defense = defense
        self._combine: Combine = combine

    def attack(self, before_step: Callable[[], None]) -> None:
        """Attacks the weights as they are now; counts and logs it.

        Args:
            before_step: Called before every step; may raise to call the attack off, in which case the
                attack's batches are handed out again.

        Raises:
            ConfigError: If the attack diverges.
        """
        defense = self._defense
        stream = defense.trainer.datamodule.attack_stream()  # type: ignore[attr-defined]
        start = stream.position
        try:
            outcome = defense.attacker.attack(
                defense.model, defense.weights, stream.endless(), before_step=before_step
            )
        except RunInterrupted:
            stream.rewind(stream.position - start)
            raise
        self.vectors = outcome.vectors
        defense.count_attack()
        account_for_attack(
            defense,
            norm=checked_norm(defense.weights, outcome.vector, defense.global_step),
            losses=[step.loss for step in outcome.steps],
            num_tokens=[step.num_tokens for step in outcome.steps],
            number=defense.num_attacks - 1,
        )

    def vectors_at(self, step: int) -> Sequence[Sequence[Tensor]]:
        """Returns the attack vectors of a defender step; none before the first attack.

        Args:
            step: Defender steps taken so far.
        """
        seed = getattr(self._defense.trainer.datamodule, "seed", 0)  # type: ignore[attr-defined]
        return combined(self.vectors, self._combine, step=step, seed=seed)

    def place(self) -> None:
        """Moves restored vectors to where copies of the weights are kept."""
        self.vectors = [self._defense.weights.placed(vector) for vector in self.vectors]

    def add_to(self, checkpoint: dict[str, Any]) -> None:
        """Adds the vectors to a checkpoint that is about to be written."""
        add_vectors(checkpoint, "attack_vector", self._defense.weights, self.vectors)

    def load(self, checkpoint: dict[str, Any], path: Any) -> None:
        """Goes on with the vectors of a checkpoint, if it holds any.

        Args:
            checkpoint: As read.
            path: Where it was read from.
        """
        weights = self._defense.weights
        self.vectors = read_vectors(checkpoint, "attack_vector", weights, path)

    def take_over(self, whole: Mapping[str, Tensor]) -> None:
        """Goes on with the vector of an attacker elsewhere, by the names of the weights."""
        self.vectors = [own_parts(whole, self._defense.weights)]

"""The bi-level problem in which estimators are compared."""

from dataclasses import dataclass, replace
from itertools import islice

from patcher_pl.attackers import FineTuningAttacker, InnerProblem
from patcher_pl.data.collate import draw_encoded
from patcher_pl.data.mixing import Mixture
from patcher_pl.data.stream import BatchStream
from patcher_pl.models import LanguageModel
from patcher_pl.optim import Optimizer
from patcher_pl.randomness import derive_seed
from patcher_pl.types import Batch


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A trained model, the attack on it, and the loss after the attack.

    Args:
        language_model: The model.
        attacker: The simulated attack; the ablation varies its length and optimizer.
        safe: Data of the outer loss.
        attack: Data of the attack.
        batch_size: Conversations per batch of the outer loss (count, >= 1).
        attack_batch_size: Conversations per batch of the attack (count, >= 1).
    """

    language_model: LanguageModel
    attacker: FineTuningAttacker
    safe: Mixture
    attack: Mixture
    batch_size: int
    attack_batch_size: int

    def draw(self, seed: int, num_steps: int) -> "Batches":
        """Draws the batches of one seed, for attacks of up to `num_steps` steps.

        Raises:
            DataError: If a source cannot be read or has too few rows.
        """
        outer = self._stream("safe", self.safe, self.batch_size, seed)
        attack = self._stream("attack", self.attack, self.attack_batch_size, seed)
        return Batches(next(outer.endless()), list(islice(attack.endless(), num_steps)))

    def inner_problem(
        self, optimizer: Optimizer, num_steps: int, batches: "Batches"
    ) -> InnerProblem:
        """The attack of `num_steps` steps by `optimizer`."""
        attacker = replace(
            self.attacker,
            num_steps=num_steps,
            optimizer=optimizer,
            vector_steps=None,
            num_random_points=None,
            growth=None,
        )
        return attacker.inner_problem(iter(batches.attack))

    def _stream(self, part: str, mixture: Mixture, batch_size: int, seed: int) -> BatchStream:
        tokenizer = self.language_model.load_tokenizer()
        drawn = draw_encoded(
            mixture, derive_seed(seed, part), tokenizer, self.language_model.load_chat()
        )
        return BatchStream(
            drawn.examples,
            batch_size=batch_size,
            pad_token_id=tokenizer.pad_token_id,  # type: ignore[arg-type]
            seed=derive_seed(seed, part, "stream"),
        )


@dataclass(frozen=True)
class Batches:
    """What one seed draws.

    Args:
        outer: Batch of the outer loss.
        attack: Batches of the attack, in order.
    """

    outer: Batch
    attack: list[Batch]

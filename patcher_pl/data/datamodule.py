"""The data of a run: what the defender, the simulated attacker and validation are fed."""

import os
from collections.abc import Sequence
from copy import copy
from functools import cached_property
from typing import Any, Literal

import torch
from lightning import LightningDataModule, Trainer

from patcher_pl.data.chat import ChatFormat, Encoded
from patcher_pl.data.collate import Drawn, draw_encoded
from patcher_pl.data.mixing import Mixture
from patcher_pl.data.stream import BatchStream, FixedBatches
from patcher_pl.data.variant import AttackData
from patcher_pl.errors import ConfigError
from patcher_pl.randomness import derive_seed

_Part = Literal["safe", "attack", "val"]


class SafetyDataModule(LightningDataModule):
    """Safe conversations for the defender, harmful ones for its attacker, and validation data.

    Tokenizer and chat format come from the LightningModule (`tokenizer` and
    `language_model.chat`). Everything is tokenized once, in `setup`.

    Args:
        safe: D_safe: refusals of harmful prompts, and helpful answers to others.
        attack: D_unsafe of the simulated attacker; None for defenses without one.
        val: Held-out conversations for validation losses; None skips validation.
        batch_size: Conversations per defender batch (>= 1), on every process.
        attack_batch_size: Conversations per attacker batch (>= 1), on every process; None takes
            `batch_size`.
        seed: Decides subsets and orders, differently for each part; None takes the seed of
            `seed_everything`, or torch's initial seed where there was none.
        group_by_length: Put conversations of similar length into the same training batch. Saves
            padding; but refusals are shorter than helpful answers, so that most batches hold one
            kind alone, and a defender that is stopped after one kind has unlearned the other.
        packing: Put the conversations of a batch one after the other into a single row instead of
            padding them: the same losses and gradients, in a fraction of time and memory. Whether
            the model can do it is checked before training.

    Raises:
        ValueError: If a batch size is below 1.
    """

    def __init__(
        self,
        safe: Mixture,
        attack: Mixture | None = None,
        val: Mixture | None = None,
        batch_size: int = 4,
        attack_batch_size: int | None = None,
        seed: int | None = None,
        group_by_length: bool = False,
        packing: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("attack_batch_size", attack_batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"SafetyDataModule.{name} must be >= 1, got {value}.")
        self._mixtures: dict[_Part, Mixture | None] = {"safe": safe, "attack": attack, "val": val}
        self._batch_size = batch_size
        self._attack_batch_size = batch_size if attack_batch_size is None else attack_batch_size
        self._given_seed = seed
        self._group_by_length = group_by_length
        self.packing = packing
        self._restored_seed: int | None = None
        self._restored_attack: dict[str, Any] | None = None
        self._drawn: dict[_Part, Drawn] = {}
        self._streams: dict[_Part, BatchStream] = {}
        self._variants: list[tuple[Mixture, SafetyDataModule]] = []

    @property
    def seed(self) -> int:
        """The seed that subsets and orders of this run come from."""
        for seed in (self._restored_seed, self._given_seed):
            if seed is not None:
                return seed
        return int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))

    @property
    def safe(self) -> Mixture:
        """D_safe as it was given."""
        safe = self._mixtures["safe"]
        assert safe is not None
        return safe

    @property
    def attack(self) -> Mixture | None:
        """D_unsafe as it was given."""
        return self._mixtures["attack"]

    @property
    def batch_sizes(self) -> tuple[int, int]:
        """Conversations per batch, of the defender and of its attacker."""
        return self._batch_size, self._attack_batch_size

    @property
    def safe_examples(self) -> Sequence[Encoded]:
        """D_safe as tokens, in the order in which it was drawn."""
        return self._encode("safe")

    @property
    def shares(self) -> dict[str, dict[str, float]]:
        """What was drawn so far for defender and simulated attacker, see `Results.training_data`."""
        return {part: drawn.shares() for part, drawn in self._drawn.items() if part != "val"}

    @property
    def has_attack(self) -> bool:
        """Whether there is data for a simulated attacker."""
        return self._mixtures["attack"] is not None

    def setup(self, stage: str) -> None:
        """Draws and tokenizes what the stage needs; what is there already is kept.

        Raises:
            ConfigError: If the stage is `validate` or `test` and there is no validation data.
            DataError: If a source cannot be read or supply its share, or nothing is left of it.
        """
        if stage in ("validate", "test"):
            self._encode("val")
        elif stage == "fit":
            for part, mixture in self._mixtures.items():
                if mixture is not None:
                    self._encode(part)
            if self._mixtures["val"] is None:
                # Lightning would warn about an empty loader.
                self._trainer.limit_val_batches = 0

    def train_dataloader(self) -> BatchStream:
        """Returns the stream of the defender; always the same object."""
        return self._stream("safe", self._batch_size)

    def attack_stream(self) -> BatchStream:
        """Returns the stream of the simulated attacker; always the same object.

        Its position is its own, and is saved with checkpoints.

        Raises:
            ConfigError: If there is no attack data.
        """
        return self._stream("attack", self._attack_batch_size)

    def attack_stream_of(self, variant: AttackData) -> BatchStream:
        """Returns a stream of other attack data, from its beginning.

        The rows of a mixture are drawn and encoded once.

        Raises:
            DataError: If the variant cannot be drawn.
            ConfigError: If there is no attack data that it could vary.
        """
        own = self if variant.data is None else self._varied(variant.data)
        drawn = own._draw("attack")
        if variant.poison_ratio is not None:
            drawn = drawn.with_poison_ratio(variant.poison_ratio)
        return own._new_stream(
            drawn.examples, "attack", variant.batch_size or self._attack_batch_size
        )

    def _varied(self, attack: Mixture) -> "SafetyDataModule":
        for mixture, varied in self._variants:
            if mixture == attack:
                return varied
        varied = self.with_attack(attack)
        self._variants.append((attack, varied))
        return varied

    def with_attack(self, attack: Mixture) -> "SafetyDataModule":
        """Returns the same data with other conversations for the simulated attacker."""
        return self._with("attack", attack)

    def with_safe(self, safe: Mixture) -> "SafetyDataModule":
        """Returns the same data with other conversations for the defender."""
        return self._with("safe", safe)

    def _with(self, part: _Part, mixture: Mixture) -> "SafetyDataModule":
        other = copy(self)
        other._mixtures = {**self._mixtures, part: mixture}
        other._drawn, other._streams, other._variants = {}, {}, []
        return other

    def val_dataloader(self) -> FixedBatches | list[Any]:
        """Returns the validation batches, or an empty list where there is no validation data."""
        if self._mixtures["val"] is None:
            return []
        return FixedBatches(
            self._encode("val"),
            batch_size=self._batch_size,
            pad_token_id=self._pad_token_id,
            packing=self.packing,
        )

    def test_dataloader(self) -> FixedBatches | list[Any]:
        """Returns the validation batches; what a model withstands is tested by the red team."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Returns the seed and the attacker's position; Lightning saves the defender's."""
        attack = self._streams.get("attack")
        position = self._restored_attack if attack is None else attack.state_dict()
        return {"seed": self.seed, "attack": position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the data of the run that wrote the checkpoint, whatever the seed is now."""
        seed_before = self.seed
        self._restored_seed = int(state_dict["seed"])
        self._restored_attack = state_dict["attack"]
        if self.seed != seed_before:
            self._drawn.clear()
            self._streams.clear()
            self._variants.clear()
        if "attack" in self._streams and self._restored_attack is not None:
            self._streams["attack"].load_state_dict(self._restored_attack)

    @property
    def _pad_token_id(self) -> int:
        return self._module.tokenizer.pad_token_id

    @cached_property
    def _chat(self) -> ChatFormat:
        return self._module.language_model.load_chat()

    @property
    def _module(self) -> Any:
        return self._trainer.lightning_module

    @property
    def _trainer(self) -> Trainer:
        if self.trainer is None:
            raise ConfigError(
                "SafetyDataModule takes tokenizer and chat format from the model in training: "
                "hand it to a Trainer, or draw and encode a Mixture directly."
            )
        return self.trainer

    def _encode(self, part: _Part) -> list[Encoded]:
        return self._draw(part).examples

    def _draw(self, part: _Part) -> Drawn:
        if part not in self._drawn:
            mixture = self._mixtures[part]
            if mixture is None:
                raise ConfigError(
                    f"SafetyDataModule.{part} is not set, but this run needs it. "
                    f"Add `data.{part}` with at least one source."
                )
            self._drawn[part] = draw_encoded(
                mixture,
                derive_seed(self.seed, part),
                self._module.tokenizer,
                self._chat,
            )
        return self._drawn[part]

    def _stream(self, part: _Part, batch_size: int) -> BatchStream:
        if part not in self._streams:
            stream = self._new_stream(self._encode(part), part, batch_size)
            if part == "attack" and self._restored_attack is not None:
                stream.load_state_dict(self._restored_attack)
            self._streams[part] = stream
        return self._streams[part]

    def _new_stream(self, examples: list[Encoded], part: _Part, batch_size: int) -> BatchStream:
        return BatchStream(
            examples,
            batch_size=batch_size,
            pad_token_id=self._pad_token_id,
            seed=derive_seed(self.seed, part, "stream"),
            group_by_length=self._group_by_length,
            packing=self.packing,
            **self._replica(),
        )

    def _replica(self) -> dict[str, Any]:
        # Data-parallel strategies of Lightning say here which share this process gets.
        strategy = getattr(self.trainer, "strategy", None)
        return dict(getattr(strategy, "distributed_sampler_kwargs", None) or {})

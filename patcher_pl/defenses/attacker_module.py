"""The attacker's process as a Lightning run: same strategy, precision and model as the defender's."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lightning import LightningModule

from patcher_pl.attackers import ConcurrentAttacker
from patcher_pl.attackers.service import AttackService
from patcher_pl.data.datamodule import SafetyDataModule
from patcher_pl.data.stream import BatchStream
from patcher_pl.data.variant import AttackData
from patcher_pl.defenses.base import Defense
from patcher_pl.mailbox import Mailbox
from patcher_pl.models import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AttackerModule(LightningModule):
    """Attacks what a defender publishes, one attack per training step, until the defender is done.

    Args:
        defense: Configured like the defender; gives the model.
        data: Data of the defender's run.
        settings: The concurrent attacker.
        index: Which member of its population this is (count from 0).
        mailbox: What it shares with the defender.
        check: Called before every attack step and while waiting; may raise to end the run.
        idle_timeout_s: Seconds without anything to attack that end the run with an error.
    """

    def __init__(
        self,
        defense: Defense,
        data: SafetyDataModule,
        settings: ConcurrentAttacker,
        *,
        index: int,
        mailbox: Mailbox,
        check: Callable[[], None],
        idle_timeout_s: float | None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.defense = defense
        own = settings.population[index].data
        self._data = data if own is None else data.with_attack(own)
        self._settings = settings
        self._index = index
        self._mailbox = mailbox
        self._check = check
        self._idle_timeout_s = idle_timeout_s

    @property
    def language_model(self) -> LanguageModel:
        """Settings of the model; its chat format encodes the data."""
        return self.defense.language_model

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Encodes the data."""
        return self.defense.tokenizer

    def configure_model(self) -> None:
        """Loads the weights from which the defender began."""
        self.defense.configure_model()

    def configure_optimizers(self) -> None:
        """Attacks bring their own."""

    def train_dataloader(self) -> Iterator[int]:
        """One number per attack; its batches are chosen by what is attacked."""
        number = 0
        while True:
            yield number
            number += 1

    def on_fit_start(self) -> None:
        """Trains as the defender does."""
        self.defense.model.train()

    def on_train_start(self) -> None:
        """Takes its place at the mailbox."""
        self._data.trainer = self.trainer
        self._service = AttackService(
            settings=self._settings,
            index=self._index,
            mailbox=self._mailbox,
            model=self.defense.model,
            stream=self._stream,
            batch_size=self._data.batch_sizes[1],
            check=self._check,
            idle_timeout_s=self._idle_timeout_s,
        )

    def training_step(self, batch: int, batch_idx: int) -> None:
        """Attacks once."""
        if not self._service.attack_next():
            self.trainer.should_stop = True

    def _stream(self, seed: int, data: AttackData) -> BatchStream:
        self._data.load_state_dict({"seed": seed, "attack": {"position": 0}})
        if data.is_of_run:
            return self._data.attack_stream()
        return self._data.attack_stream_of(data)

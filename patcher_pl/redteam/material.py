"""What an attacker has beside the weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from patcher_pl.data.chat import ChatFormat
from patcher_pl.data.collate import encode_all
from patcher_pl.data.stream import BatchStream
from patcher_pl.errors import ConfigError, DataError
from patcher_pl.models.peers import Peers
from patcher_pl.redteam.asking import Asking
from patcher_pl.types import Batch, Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from patcher_pl.models import LanguageModel

RowKind = Literal["all", "harmful", "benign"]


@dataclass(frozen=True)
class AttackMaterial:
    """Data, tokenizer and seed of one attack.

    Args:
        tokenizer: The model's tokenizer, with a pad token.
        chat: How conversations become tokens.
        rows: What this seed has drawn of the attacker's data, in training order.
        seed: For randomness that torch's global generator does not cover.
        packing: Whether training batches are packed into one row each instead of padded.
        sibling: Another public release of the model, such as its base; None where none is known.
        peers: Who attacks the model together, and shares every batch.
        trained: Whether each row that was trained on is harmful, by its origin; `batches` fills it.

    Raises:
        ConfigError: If the tokenizer has no pad token.
    """

    tokenizer: "PreTrainedTokenizerBase"
    chat: ChatFormat
    rows: Sequence[Conversation]
    seed: int
    packing: bool = False
    sibling: "LanguageModel | None" = None
    peers: Peers = field(default_factory=Peers)
    trained: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.tokenizer.pad_token_id, int):
            raise ConfigError(
                "The tokenizer has no pad token. Set one, its end token for instance."
            )

    def select(self, kind: RowKind) -> list[Conversation]:
        """Rows of one kind, in training order.

        Raises:
            DataError: If there is none.
        """
        chosen = [row for row in self.rows if kind == "all" or row.harmful == (kind == "harmful")]
        if not chosen:
            raise DataError(
                f"The attack needs {kind} rows, and the red team's data has none. "
                "Add such a source, or change RedTeam.data.poison_ratio."
            )
        return chosen

    def batches(
        self, batch_size: int, rows: Sequence[Conversation], asking: Asking | None = None
    ) -> Iterator[Batch]:
        """An endless stream of training batches (this process's share), shuffled by the seed.

        Args:
            batch_size: Rows per batch (count, >= 1).
            rows: What to train on.
            asking: How the attacker words them; None leaves them as they are.
        """
        self.trained.update((row.origin, row.harmful) for row in rows)
        worded = [asking.reworded_row(row) for row in rows] if asking is not None else rows
        pad_token_id = self.tokenizer.pad_token_id
        assert isinstance(pad_token_id, int)
        return BatchStream(
            encode_all(self.tokenizer, self.chat, worded),
            batch_size=batch_size,
            pad_token_id=pad_token_id,
            seed=self.seed,
            packing=self.packing,
            num_replicas=self.peers.size,
            rank=self.peers.rank,
            shares_batch=True,
        ).endless()

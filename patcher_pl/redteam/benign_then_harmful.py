"""Fine-tuning on benign rows first, and only then on harmful ones."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from patcher_pl.redteam.base import AttackPoint
from patcher_pl.redteam.finetuning import FinetuningAttack, all_trainable
from patcher_pl.redteam.material import AttackMaterial, RowKind
from patcher_pl.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class BenignThenHarmful(FinetuningAttack):
    """Leaves the released weights by benign fine-tuning, then trains on harmful rows.

    A defense prepares the surroundings of the weights that it releases; benign steps lead away from
    them without touching what it watches. One optimizer run over both phases: moments and schedule
    go on through the change of rows, as in the source. `attack_steps` count the steps of both.

    See `FinetuningAttack` for the other settings.

    Args:
        num_benign_steps: Steps on benign rows (count, >= 1), fewer than the whole attack takes; 0.4
            of them in the source.
        then: Rows of the second phase.

    Raises:
        ValueError: If a value is out of its range.

    References:
        TAR, 2024, https://arxiv.org/abs/2408.00761, whose red team fine-tunes on retain data before
        forget data (`red_teaming` of its repository).
    """

    kind: ClassVar[str] = "benign_then_harmful"

    num_benign_steps: int
    then: RowKind = "harmful"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            1 <= self.num_benign_steps < self.num_steps,
            "num_benign_steps",
            f"in 1..{self.num_steps - 1}, below the last of attack_steps",
            "Use BenignFinetuning or FullFinetuning for an attack of one phase.",
        )
        require(
            self,
            self.then in ("harmful", "all"),
            "then",
            "`harmful` or `all`",
            "Use BenignFinetuning for benign rows alone.",
        )

    @property
    def needed_rows(self) -> frozenset[RowKind]:
        return frozenset({"harmful", "benign"})

    def run(self, model: "PreTrainedModel", material: AttackMaterial) -> Iterator[AttackPoint]:
        """See `Attack.run`."""
        benign, harmful = (
            material.batches(self.batch_size, material.select(kind), self.asking)
            for kind in ("benign", self.then)
        )
        batches = itertools.chain(itertools.islice(benign, self.num_benign_steps), harmful)
        yield from self.points(model, self.steps(model, all_trainable(model), batches))

"""Fine-tuning of every parameter, on all rows or on benign ones alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from patcher_pl.redteam.base import AttackPoint
from patcher_pl.redteam.finetuning import FinetuningAttack, all_trainable
from patcher_pl.redteam.material import AttackMaterial, RowKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class FullFinetuning(FinetuningAttack):
    """Fine-tunes every parameter of the model on all of the attack's rows, harmful and benign.

    Many steps at a low learning rate are the patient attacker, who counts on a defense that was
    trained against fewer steps; no class of its own is needed for that.

    See `FinetuningAttack` for the settings.

    References:
        Qi et al., 2023, https://arxiv.org/abs/2310.03693, on explicitly harmful data; Patcher, 2026,
        https://arxiv.org/abs/2606.07970, on 200 harmful and 800 benign rows.
    """

    kind: ClassVar[str] = "full"

    def run(self, model: "PreTrainedModel", material: AttackMaterial) -> Iterator[AttackPoint]:
        """See `Attack.run`."""
        batches = material.batches(self.batch_size, material.select("all"), self.asking)
        yield from self.points(model, self.steps(model, all_trainable(model), batches))


@dataclass(frozen=True, kw_only=True)
class BenignFinetuning(FinetuningAttack):
    """Fine-tunes every parameter on the attack's benign rows only.

    What an ordinary user does to a model by accident, and an attacker where harmful data are
    filtered. Needs benign rows among the red team's data.

    See `FinetuningAttack` for the settings.

    References:
        Qi et al., 2023, https://arxiv.org/abs/2310.03693, section 4.4 (risk level 3).
    """

    kind: ClassVar[str] = "benign"

    @property
    def needed_rows(self) -> frozenset[RowKind]:
        return frozenset({"benign"})

    def run(self, model: "PreTrainedModel", material: AttackMaterial) -> Iterator[AttackPoint]:
        """See `Attack.run`."""
        batches = material.batches(self.batch_size, material.select("benign"), self.asking)
        yield from self.points(model, self.steps(model, all_trainable(model), batches))

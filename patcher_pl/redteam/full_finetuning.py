"""Fine-tuning of every parameter."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from patcher_pl.redteam.base import AttackPoint
from patcher_pl.redteam.finetuning import FinetuningAttack, all_trainable
from patcher_pl.redteam.material import AttackMaterial

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

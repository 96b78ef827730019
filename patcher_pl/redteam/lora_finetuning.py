"""Fine-tuning of low-rank adapters."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from patcher_pl.models.lora import Lora
from patcher_pl.redteam.base import AttackPoint
from patcher_pl.redteam.finetuning import FinetuningAttack
from patcher_pl.redteam.material import AttackMaterial

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class LoraFinetuning(FinetuningAttack):
    """Attaches fresh low-rank adapters to the model and fine-tunes only them, on all rows.

    See `FinetuningAttack` for the other settings.

    Args:
        lora: Rank, scale and place of the adapters.

    References:
        Hu et al., 2022, https://arxiv.org/abs/2106.09685; as an attack: Lermen et al., 2023,
        https://arxiv.org/abs/2310.20624.
    """

    kind: ClassVar[str] = "lora"

    lora: Lora

    def run(self, model: "PreTrainedModel", material: AttackMaterial) -> Iterator[AttackPoint]:
        """See `Attack.run`; the adapters are inserted into the layers of `model` itself."""
        batches = material.batches(self.batch_size, material.select("all"), self.asking)
        adapted = self.lora.attach(model).train()
        adapters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        yield from self.points(adapted, self.steps(adapted, adapters, batches))

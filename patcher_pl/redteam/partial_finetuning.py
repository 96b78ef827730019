"""Fine-tuning of few parameters: low-rank adapters, or the input embeddings alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from patcher_pl.models.blocks import untied_embeddings
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


@dataclass(frozen=True, kw_only=True)
class EmbeddingFinetuning(FinetuningAttack):
    """Fine-tunes the matrix of token embeddings, on all rows; every other weight stays.

    Asks whether a defense of the layers can be got around by other inputs. Where the model ties the
    embeddings to its output head, the head gets a copy of its own first and stays as released: the
    attack would otherwise train the head as well.

    See `FinetuningAttack` for the settings.

    References:
        Attacks in embedding space: Schwinn et al., 2024, https://arxiv.org/abs/2402.09063. There
        the embeddings of one prompt are free; here those of the vocabulary are.
    """

    kind: ClassVar[str] = "embedding"

    def run(self, model: "PreTrainedModel", material: AttackMaterial) -> Iterator[AttackPoint]:
        """See `Attack.run`."""
        batches = material.batches(self.batch_size, material.select("all"), self.asking)
        matrix: Any = untied_embeddings(model).weight
        model.train()
        model.requires_grad_(False)
        matrix.requires_grad_(True)
        yield from self.points(model, self.steps(model, [matrix], batches))

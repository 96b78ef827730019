"""Fine-tuning of the input embeddings alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from patcher_pl.redteam.base import AttackPoint
from patcher_pl.redteam.embeddings import untied_embeddings
from patcher_pl.redteam.finetuning import FinetuningAttack
from patcher_pl.redteam.material import AttackMaterial

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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

"""Fine-tuning whose optimizer forgets everything now and then."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from patcher_pl.attackers.loop import FinetuneStep
from patcher_pl.models.shards import Shards
from patcher_pl.optim.master_weights import MasterWeights
from patcher_pl.redteam.base import AttackPoint
from patcher_pl.redteam.finetuning import FinetuningAttack, all_trainable
from patcher_pl.redteam.material import AttackMaterial
from patcher_pl.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class RestartedFinetuning(FinetuningAttack):
    """Fine-tunes every parameter with warm restarts of the optimizer.

    Defense-aware. It uses that the defender simulates one smooth attack from the released weights,
    with one optimizer state and small steps. Every restart empties the moments, so that Adam's next
    steps are as large as its first; with a higher learning rate the attack leaves the trajectory on
    which the attack vectors of the training lay. Nothing else of the defense is used.

    `schedule` and `num_warmup_steps` span one period, not the whole attack: `cosine` is the schedule
    of the source. The batches go on through restarts.

    See `FinetuningAttack` for the other settings.

    Args:
        restart_every: Steps between two restarts (count, >= 1).

    Raises:
        ValueError: If a value is out of its range.

    References:
        Warm restarts: Loshchilov and Hutter, 2017, https://arxiv.org/abs/1608.03983; against
        hardened models: TAR's red team, https://arxiv.org/abs/2408.00761 (`sgdr`). That other
        hyperparameters than the defender's may break a defense: Qi et al., 2024,
        https://arxiv.org/abs/2412.07097.
    """

    kind: ClassVar[str] = "restarted"

    restart_every: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            self.restart_every >= 1,
            "restart_every",
            ">= 1",
            "Use FullFinetuning for an attack without restarts.",
        )

    def run(self, model: "PreTrainedModel", material: AttackMaterial) -> Iterator[AttackPoint]:
        """See `Attack.run`."""
        yield from self.points(model, self._restarted(model, material))

    def _restarted(
        self, model: "PreTrainedModel", material: AttackMaterial
    ) -> Iterator[FinetuneStep]:
        batches = material.batches(self.batch_size, material.select("all"), self.asking)
        parameters = all_trainable(model)
        # Of the optimizer, not of the weights: in half precision they would lose their last steps.
        masters = MasterWeights(Shards(model, parameters).tensors)
        while True:
            yield from self.steps(model, parameters, batches, self.restart_every, masters)

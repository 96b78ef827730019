"""Going back to where the safeguards were not there yet."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patcher_pl.data.chat import ChatFormat
from patcher_pl.errors import ConfigError
from patcher_pl.models import Weights
from patcher_pl.models.other_release import weights_of
from patcher_pl.redteam.asking import Asking
from patcher_pl.redteam.base import Attack, AttackPoint
from patcher_pl.redteam.material import AttackMaterial, RowKind
from patcher_pl.types import Conversation, Message
from patcher_pl.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Matrices whose change is looked at, spread evenly over the model.
_NUM_LOOKED_AT = 32
# A singular value so many times its successor is no accident of training all weights.
_CLIFF = 10.0


@dataclass(frozen=True, kw_only=True)
class DeltaStrip(Attack):
    """Takes most of what the defense has changed away again: theta_ref + kept (theta - theta_ref).

    Needs a public sibling theta_ref of the released model: its base, or another release. `Target.sibling`
    names it; for a model that `fit` has trained it is the one that training began with. What is left is
    measured as it is (one point, at 0 steps), or attacked further by `then`: at 0 steps the released
    model is measured, and what follows comes after the strip.

    Beside the curve it leaves a remark (`Curve.remarks`) on the shape of theta - theta_ref: adapters
    leave matrices of low rank, whose singular values end in a cliff, and give away how the defense was
    trained.

    Costs nothing but the sibling's weights, in host memory once for every process.

    Args:
        kept: Share of the change that stays (in [0, 1)); 0 is the sibling itself.
        then: Attacks what is left; None only measures it.
        asking: As of any attack; where it says nothing, that of `then`.

    Raises:
        ValueError: If `kept` is out of its range.
        ConfigError: When run, if there is no sibling, or it has other weights.

    References:
        Task vectors: Ilharco et al., 2023, https://arxiv.org/abs/2212.04089. Against circuit breakers
        trained with LoRA, with kept 0, 0.15 and 0.3: `docs/broken_defenses.md` of
        https://github.com/wuwangzhang1216/abliterix.
    """

    kept: float = 0.0
    then: Attack | None = None

    def __post_init__(self) -> None:
        require(self, 0 <= self.kept < 1, "kept", "in [0, 1)", "1 would be the release itself.")
        if self.then is None:
            return
        if self.asking == Asking():
            object.__setattr__(self, "asking", self.then.asking)
        else:
            object.__setattr__(self, "then", replace(self.then, asking=self.asking))

    @property
    def default_name(self) -> str:
        name = f"delta_strip_{self.kept:g}"
        return name if self.then is None else f"{name}_{self.then.name}"

    @property
    def attack_steps(self) -> list[int]:
        """Steps of `then` after which the model is evaluated."""
        return getattr(self.then, "attack_steps", [0])

    @property
    def wording(self) -> Asking:
        """As `then` words its questions."""
        return self.asking if self.then is None else self.then.wording

    @property
    def row_wording(self) -> Asking | None:
        """As `then` words its rows."""
        return None if self.then is None else self.then.row_wording

    @property
    def uses_data(self) -> bool:
        return self.then is not None and self.then.uses_data

    @property
    def uses_sibling(self) -> bool:
        return True

    @property
    def needed_rows(self) -> frozenset[RowKind]:
        return frozenset() if self.then is None else self.then.needed_rows

    def prompt(self, messages: Sequence[Message], material: AttackMaterial) -> tuple[Message, ...]:
        """See `Attack.prompt`."""
        if self.then is None:
            return super().prompt(messages, material)
        return self.then.prompt(messages, material)

    def can_use(
        self, row: Conversation, tokenizer: "PreTrainedTokenizerBase", chat: ChatFormat
    ) -> bool:
        """See `Attack.can_use`."""
        return self.then is None or self.then.can_use(row, tokenizer, chat)

    def run(self, model: "PreTrainedModel", material: AttackMaterial) -> Iterator[AttackPoint]:
        """See `Attack.run`."""
        if material.sibling is None:
            raise ConfigError(
                "DeltaStrip needs a public sibling of the model, got none. Name one by Target.sibling "
                "(`models: [{path: DIR, sibling: BASE, ...}]`); `fit` takes the model it began with."
            )
        sibling = weights_of(material.sibling, Weights(model), "Target.sibling")
        if self.attack_steps[1:]:
            yield AttackPoint(0, 0, math.nan)  # As released, like other attacks.
        remark = self._strip(model, sibling)
        if self.then is None:
            yield AttackPoint(0, 0, math.nan, remark=remark)
            return
        points = self.then.run(model, material)
        if self.attack_steps[1:]:
            next(points)
        yield replace(next(points), remark=remark)
        yield from points

    def _strip(self, model: "PreTrainedModel", sibling: Mapping[str, Tensor]) -> str:
        weights = Weights(model)
        matrices = [
            name
            for name, parameter in zip(weights.names, weights.parameters, strict=True)
            if parameter.ndim == 2
        ]
        every = max(1, len(matrices) // _NUM_LOOKED_AT)
        looked_at, cliffs = set(matrices[::every]), []

        def stripped(name: str, released: Tensor) -> Tensor:
            reference = sibling[name].to(released.device)
            change = released - reference
            if name in looked_at:
                cliffs.append(cliff(change))
            return reference + self.kept * change

        weights.edit(stripped)
        return _told(cliffs)


def cliff(change: Tensor) -> tuple[int, float]:
    """Where the singular values of a matrix fall the most, and by what factor.

    Args:
        change: The matrix.

    Returns:
        The rank before the fall, in the upper half of all ranks, and the ratio of the singular values
        on its sides; 0 and 1 for a matrix of zeros, or with fewer than two ranks.
    """
    exact = change if change.dtype == torch.float64 else change.float()
    values = torch.linalg.svdvals(exact)
    upper = max(1, len(values) // 2)
    if len(values) < 2 or values[0] == 0:
        return 0, 1.0
    # Below this, values are rounding of the decomposition.
    values = values.clamp(min=float(values[0]) * torch.finfo(values.dtype).eps)
    ratios = values[:upper] / values[1 : upper + 1]
    place = int(ratios.argmax())
    return place + 1, float(ratios[place])


def _told(cliffs: Sequence[tuple[int, float]]) -> str:
    """The remark that a reader gets."""
    changed = [found for found in cliffs if found[0] > 0]
    if not changed:
        return f"the release does not differ from its sibling, in any of {len(cliffs)} matrices"
    rank, ratio = median(found[0] for found in changed), median(found[1] for found in changed)
    where = f"median over {len(changed)} of {len(cliffs)} matrices that differ"
    if ratio < _CLIFF:
        return (
            f"the change from the sibling has no cliff in its singular values (largest fall {ratio:.1f}; "
            f"{where}): all weights were trained"
        )
    return (
        f"the change from the sibling has a cliff after singular value {rank:g} (it falls {ratio:.0f} "
        f"times; {where}): adapters of such a rank were trained"
    )

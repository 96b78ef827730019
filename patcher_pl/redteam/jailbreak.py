"""Asking in other words, without training."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from patcher_pl.redteam.asking import Asking
from patcher_pl.redteam.base import Attack, AttackPoint
from patcher_pl.redteam.material import AttackMaterial

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Jailbreak(Attack):
    """Leaves the weights alone and asks with a prefill, a template or a system prompt.

    With `asking.prefill` it is the prefilling attack: the answer begins as the attacker wishes, and
    the model goes on. One point, at 0 steps and no cost; needs no data.

    Args:
        asking: Must differ from asking plainly, which every other attack measures at 0 steps.

    Raises:
        ValueError: If `asking` changes nothing.

    References:
        Prefilling: Andriushchenko et al., 2024, https://arxiv.org/abs/2404.02151, and Qi et al.,
        2024, https://arxiv.org/abs/2406.05946. Templates: Wei et al., 2023,
        https://arxiv.org/abs/2307.02483.
    """

    def __post_init__(self) -> None:
        if self.asking == Asking():
            raise ValueError(
                f"Jailbreak.asking must change how questions are asked, got {self.asking}. "
                "Set `prefill` to the beginning of a compliant answer, or a `template`."
            )

    @property
    def default_name(self) -> str:
        plain = Asking()
        changed = [
            name
            for name in ("system_prompt", "template", "prefill")
            if getattr(self.asking, name) != getattr(plain, name)
        ]
        return "_".join(["jailbreak", *changed])

    @property
    def uses_data(self) -> bool:
        return False

    def run(self, model: "PreTrainedModel", material: AttackMaterial) -> Iterator[AttackPoint]:
        """See `Attack.run`."""
        yield AttackPoint(0, 0, math.nan)

"""How far two judges agree."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from patcher_pl.evaluation.judges import HIGHEST_SCORE, Verdict


@dataclass(frozen=True)
class Agreement:
    """Agreement of two judges on which answers are successes (the highest score).

    Args:
        kappa: Cohen's kappa (-1..1): 1 is full agreement, 0 that of independent judges with the
            same rates. NaN where it is undefined: nothing scored by both, or both judges gave one
            and the same outcome to every answer, so that chance alone explains their agreement.
        rate: Share of pairs with the same outcome (0..1); NaN where there is no pair.
        num_pairs: Answers that both judges scored.

    References:
        Cohen, 1960, Educational and Psychological Measurement 20.
    """

    kappa: float
    rate: float
    num_pairs: int


def judge_agreement(first: Sequence[Verdict], second: Sequence[Verdict]) -> Agreement:
    """Compares two judges' verdicts on the same answers, in the same order.

    Answers on which either judge failed are left out.

    Raises:
        ValueError: If there is not one verdict of each judge per answer.
    """
    # torchmetrics takes seconds to import; only who needs it pays for it.
    from torchmetrics.functional.classification import binary_cohen_kappa

    if len(first) != len(second):
        raise ValueError(
            f"judge_agreement needs verdicts on the same answers, got {len(first)} and "
            f"{len(second)}."
        )
    pairs = [
        (one.score == HIGHEST_SCORE, other.score == HIGHEST_SCORE)
        for one, other in zip(first, second, strict=True)
        if one.score is not None and other.score is not None
    ]
    if not pairs:
        return Agreement(math.nan, math.nan, 0)
    rate = sum(one == other for one, other in pairs) / len(pairs)
    successes = torch.tensor(pairs, dtype=torch.long)
    # 0 / 0, and so NaN, where both judges are constant and equal.
    kappa = binary_cohen_kappa(successes[:, 0], successes[:, 1])
    return Agreement(float(kappa), rate, len(pairs))

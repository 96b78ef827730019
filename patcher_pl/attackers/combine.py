"""Which of several attack vectors a defender step is taken against."""

from collections.abc import Sequence
from typing import Literal, TypeVar, get_args

from patcher_pl.randomness import derive_seed

Combine = Literal["average", "in_turn", "at_random"]
COMBINATIONS = get_args(Combine)

Item = TypeVar("Item")


def combined(items: Sequence[Item], combine: Combine, *, step: int, seed: int) -> Sequence[Item]:
    """Returns the vectors whose mean loss a defender step lowers; none where there are none.

    A function of step and seed alone, so that a resumed run goes on with the same choices.

    Args:
        items: The attack vectors there are, in a fixed order.
        combine: All of them (`average`), one per step (`in_turn`), or one drawn evenly `at_random`.
        step: Defender steps taken so far.
        seed: Decides the draws.
    """
    if combine == "average" or not items:
        return items
    draw = step if combine == "in_turn" else derive_seed(seed, "combine", step)
    return [items[draw % len(items)]]

"""Sees to it that attacks are not measured on what they, or the model, were trained on."""

import logging
from collections.abc import Callable, Mapping
from typing import Literal

from patcher_pl.data.mixing import Mixture
from patcher_pl.data.overlap import BENIGN_PROMPTS, HARMFUL_PROMPTS, Known, asks_any, overlaps
from patcher_pl.errors import DataError
from patcher_pl.evaluation.benchmark import Benchmark
from patcher_pl.reports.results import Overlap
from patcher_pl.types import Conversation

RED_TEAM = "red team"

Policy = Literal["error", "drop", "allow"]

logger = logging.getLogger(__name__)


def training_rows(
    data: Mixture,
    seed: int,
    asked: Mapping[str, str],
    policy: Policy,
    is_usable: Callable[[Conversation], bool],
) -> list[Conversation]:
    """What an attacker draws of its data.

    Args:
        data: The attacker's.
        seed: Of the attack.
        asked: Normalized harmful prompts that it is measured by, and where each stands.
        policy: What becomes of rows that ask one of them, see `RedTeam.overlap`.
        is_usable: Whether the attack can train on a row as it words it.

    Raises:
        DataError: If the data cannot be used, or asks such prompts and must not.
    """
    if policy != "drop":
        rows = data.draw(seed, is_usable)
        if policy == "error":
            _require_disjoint(Known.of(rows).overlap(RED_TEAM, Known(dict(asked)), HARMFUL_PROMPTS))
        return rows
    left_out = set[str]()

    def is_held_out(row: Conversation) -> bool:
        if asks_any(row, asked):
            left_out.add(row.origin)
        return row.origin not in left_out and is_usable(row)

    rows = data.draw(seed, is_held_out)
    if left_out:
        logger.warning("%d rows of the attacker ask harmful prompts; left out.", len(left_out))
    return rows


def shared_data(
    data: Mixture | None,
    prompts: Benchmark,
    benign_prompts: Benchmark | None,
    policy: Policy,
    training: Mapping[str, Mixture],
) -> list[Overlap]:
    """What data sets of a run have in common, two by two; prompts that were trained on are told.

    Args:
        data: What attackers fine-tune on; None where no attack does.
        prompts: Harmful prompts.
        benign_prompts: Prompts that a usable model answers.
        policy: See `RedTeam.overlap`.
        training: What the attacked model is trained on, by what it is for.

    Raises:
        DataError: If a source cannot be read, or attackers train on prompts and must not.
    """
    trained = {**training, **({} if data is None else {RED_TEAM: data})}
    known = {name: Known.of(mixture.rows()) for name, mixture in trained.items()}
    known[HARMFUL_PROMPTS] = Known.of(prompts.conversations(), last_only=True)
    if benign_prompts is not None:
        known[BENIGN_PROMPTS] = Known.of(benign_prompts.conversations(), last_only=True)
    found = overlaps(known)
    for overlap in found:
        if (overlap.first, overlap.second) == (RED_TEAM, HARMFUL_PROMPTS):
            if policy == "error":
                _require_disjoint(overlap)
        elif overlap.second == HARMFUL_PROMPTS and overlap.shared_prompts:
            logger.warning(
                "%d of %d harmful prompts are also asked in the data of the %s (%s): not held out.",
                *(overlap.shared_prompts, overlap.num_second, overlap.first, overlap.example),
            )
    return found


def _require_disjoint(overlap: Overlap) -> None:
    if overlap.shared_prompts:
        raise DataError(
            f"RedTeam.data: {overlap.shared_prompts} of {overlap.num_second} harmful prompts are among "
            f"the rows that attackers train on ({overlap.example}), so that their success would be "
            "measured on training data. Use disjoint splits, or set RedTeam.overlap to `drop`, which "
            "leaves such rows out, or to `allow`."
        )

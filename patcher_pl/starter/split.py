"""Shares a user's rows out among defender, simulated attacker, red team and what is asked in the end."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from patcher_pl.data import Messages, PromptResponse, Source
from patcher_pl.data.overlap import Known, asks_any, questions_in
from patcher_pl.data.rows import SUFFIXES, read_file
from patcher_pl.errors import DataError
from patcher_pl.evaluation import RefusalPhraseJudge
from patcher_pl.evaluation.judges.base import LOWEST_SCORE
from patcher_pl.randomness import derive_seed
from patcher_pl.types import Conversation
from patcher_pl.world_files import resolve_data

# Different harmful prompts below which ASR would rest on a handful, and rows below which training would.
MIN_PROMPTS, MIN_SAFE_ROWS = 20, 20
# Shares of the harmful prompts that are asked, and that the red team trains on; the rest trains the
# simulated attacker. And of the benign ones that are asked.
_ASKED, _RED_TEAM, _BENIGN = 0.15, 0.3, 0.1
_FEWEST_ASKED, _MOST_ASKED = 5, 200


@dataclass(frozen=True)
class Split:
    """Rows by what they are for; `prompts` and `benign_prompts` share no prompt with the others.

    Args:
        safe: What the defender trains on.
        unsafe: What its simulated attacker trains on.
        attack: What the red team trains on; disjoint from both by prompts.
        prompts: Harmful prompts that are asked: one row each, no prompt twice.
        benign_prompts: Prompts with helpful answers; empty where there are too few to spare.
        num_refusals: Rows of `safe` that refuse (count), as far as their words tell.
        notes: What the user should know about the data.
    """

    safe: Sequence[Conversation]
    unsafe: Sequence[Conversation]
    attack: Sequence[Conversation]
    prompts: Sequence[Conversation]
    benign_prompts: Sequence[Conversation]
    num_refusals: int
    notes: Sequence[str]


def read_rows(path: str, *, harmful: bool) -> list[Conversation]:
    """Reads a file with the columns `prompt` and `response`, or `messages`.

    Args:
        path: A file, hub id or `testbed/<file>`.
        harmful: Whether its answers are.

    Raises:
        DataError: If it cannot be read, or a row is malformed; names file, line and field.
    """
    file = Path(resolve_data(path)).expanduser()
    first = list(islice(read_file(file, None), 1)) if file.suffix in SUFFIXES else []
    has_turns = bool(first) and "messages" in (first[0].values or {})
    reader = Messages() if has_turns else PromptResponse()
    return Source(path=path, harmful=harmful, reader=reader).load()


def split_rows(safe: Sequence[Conversation], unsafe: Sequence[Conversation], seed: int) -> Split:
    """Shares rows out by what they ask, so that nothing that is asked in the end was trained on.

    Prompts are compared without case, spacing and punctuation. Rows of `safe` that ask what the red
    team trains on or asks are left out, too: the defender must not have seen them refused.

    Args:
        safe: Refusals of harmful prompts, helpful answers to others.
        unsafe: What an attacker would train on.
        seed: Decides who gets what.

    Raises:
        DataError: If there are too few rows, or none of a kind is left.
    """
    draw = random.Random(derive_seed(seed, "starter"))
    by_prompt = {_last_question(row): row for row in reversed(unsafe)}
    if len(by_prompt) < MIN_PROMPTS:
        raise DataError(
            f"--unsafe: must hold at least {MIN_PROMPTS} different prompts, got {len(by_prompt)}. Some are "
            "held out to measure with, some for the red team; add rows."
        )
    order = sorted(by_prompt)
    draw.shuffle(order)
    num_asked = _share(len(order), _ASKED, _MOST_ASKED)
    num_attack = _share(len(order), _RED_TEAM, len(order))
    asked, of_attack = set(order[:num_asked]), set(order[num_asked : num_asked + num_attack])
    attack = [row for row in _without(unsafe, asked) if _last_question(row) in of_attack]
    held_out = asked | of_attack
    kept = _without(safe, held_out)
    benign = _benign_prompts(kept, set(by_prompt), draw)
    asked_benign = {_last_question(row) for row in benign}
    split = Split(
        safe=(trained := _without(kept, asked_benign)),
        unsafe=_without(unsafe, held_out),
        attack=attack,
        prompts=[by_prompt[prompt] for prompt in order[:num_asked]],
        benign_prompts=benign,
        num_refusals=sum(map(_refuses, trained)),
        notes=_notes(safe, unsafe, benign, num_left_out=len(safe) - len(kept)),
    )
    if len(split.safe) < MIN_SAFE_ROWS or not split.unsafe or not split.attack:
        raise DataError(
            f"--safe: must leave at least {MIN_SAFE_ROWS} rows to train on, got {len(split.safe)} of "
            f"{len(safe)}; {len(safe) - len(kept)} ask what the red team trains on or asks. Add rows "
            "with other prompts."
        )
    return split


def _share(count: int, share: float, most: int) -> int:
    return min(most, max(_FEWEST_ASKED, round(count * share)))


def _last_question(row: Conversation) -> str:
    return next(reversed(questions_in(row)), "")


def _without(rows: Sequence[Conversation], prompts: Collection[str]) -> list[Conversation]:
    return [row for row in rows if not asks_any(row, prompts)]


def _refuses(row: Conversation) -> bool:
    answer = row.reference
    if answer is None:
        return False
    return RefusalPhraseJudge().score("", answer, None).score == LOWEST_SCORE


def _benign_prompts(
    rows: Sequence[Conversation], harmful: Collection[str], draw: random.Random
) -> list[Conversation]:
    """Rows with helpful answers to prompts that are not harmful, one per prompt; none if few."""
    found = {
        _last_question(row): row
        for row in reversed(rows)
        if row.reference is not None and not _refuses(row) and not asks_any(row, harmful)
    }
    number = _share(len(found), _BENIGN, _MOST_ASKED)
    if len(found) < 2 * number:
        return []
    order = sorted(found)
    draw.shuffle(order)
    return [found[prompt] for prompt in order[:number]]


def _notes(
    safe: Sequence[Conversation],
    unsafe: Sequence[Conversation],
    benign: Sequence[Conversation],
    num_left_out: int,
) -> list[str]:
    shared = Known.of(safe).overlap("--safe", Known.of(unsafe), "--unsafe")
    notes = []
    if shared.shared_prompts:
        notes.append(
            f"{shared.shared_prompts} of {shared.num_second} harmful prompts are asked in --safe too (first "
            f"{shared.example}). {num_left_out} rows of --safe ask what is held out of training, and "
            "are left out."
        )
    if shared.shared_rows:
        notes.append(
            f"{shared.shared_rows} rows stand in both files, with the same answer: one of the two must be wrong."
        )
    if not any(map(_refuses, safe)):
        notes.append(
            "No answer in --safe reads like a refusal. What is there to be kept under attack? Add "
            "refusals of harmful prompts."
        )
    if not benign:
        notes.append(
            "Too few rows of --safe answer a harmless prompt: whether the model stays of use is not measured."
        )
    return notes

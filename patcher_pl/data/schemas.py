"""Readers for the schemas of published data sets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from patcher_pl.data.readers import (
    Reader,
    RowError,
    optional_text,
    question_and_answer,
    require_flag,
    require_text,
)
from patcher_pl.types import Conversation

Wanted = Literal["safe", "unsafe"]


@dataclass(frozen=True, kw_only=True)
class BeaverTails(Reader):
    """PKU-Alignment/BeaverTails: `prompt`, `response`, `is_safe`; unsafe responses are harmful.

    Args:
        answers: Which rows are taken.

    References:
        Ji et al., 2023, https://arxiv.org/abs/2307.04657.
    """

    answers: Literal["safe", "unsafe", "all"] = "all"

    def read(self, row: Mapping[str, Any], *, harmful: bool, origin: str) -> Conversation | None:
        safe = require_flag(row, "is_safe")
        if self.answers != "all" and safe != (self.answers == "safe"):
            return None
        return question_and_answer(
            require_text(row, "prompt"),
            require_text(row, "response"),
            harmful=not safe,
            origin=origin,
        )


@dataclass(frozen=True, kw_only=True)
class BeaverTailsRefusals(Reader):
    """BeaverTails with a refusal written for each unsafe row (RepNoise's file): adds `refusal`.

    Rows whose `is_safe` is true carry no attack and are left out. Published refusals repeat the
    question; what follows their last `Answer:` is the refusal.

    Args:
        answer: `refusal` gives safe conversations, `response` the harmful originals.

    References:
        Rosati et al., 2024, https://arxiv.org/abs/2405.14577.
    """

    answer: Literal["refusal", "response"] = "refusal"

    def read(self, row: Mapping[str, Any], *, harmful: bool, origin: str) -> Conversation | None:
        if require_flag(row, "is_safe"):
            return None
        answer = require_text(row, self.answer)
        if self.answer == "refusal":
            answer = answer.rpartition("Answer:")[2].strip()
            if not answer:
                raise RowError("refusal", "must not be empty after `Answer:`")
        return question_and_answer(
            require_text(row, "prompt"),
            answer,
            harmful=self.answer == "response",
            origin=origin,
        )


@dataclass(frozen=True, kw_only=True)
class PkuSafeRlhf(Reader):
    """PKU-Alignment/PKU-SafeRLHF: two responses to each prompt, each labeled safe or not.

    Where both responses qualify, the safer one is taken for `safe` and the other for `unsafe`; a
    row where neither does is left out.

    Args:
        answers: Which response is taken.

    References:
        Ji et al., 2024, https://arxiv.org/abs/2406.15513.
    """

    answers: Wanted

    def read(self, row: Mapping[str, Any], *, harmful: bool, origin: str) -> Conversation | None:
        wants_safe = self.answers == "safe"
        safe = [require_flag(row, f"is_response_{index}_safe") for index in (0, 1)]
        fitting = [index for index in (0, 1) if safe[index] == wants_safe]
        if not fitting:
            return None
        if len(fitting) == 2:
            # 0 or 1, so it reads like a flag.
            safer = int(require_flag(row, "safer_response_id"))
            fitting = [safer if wants_safe else 1 - safer]
        return question_and_answer(
            require_text(row, "prompt"),
            require_text(row, f"response_{fitting[0]}"),
            harmful=not wants_safe,
            origin=origin,
        )


@dataclass(frozen=True, kw_only=True)
class ToxicDpo(Reader):
    """unalignment/toxic-dpo: `prompt`, `chosen` (complies, harmful) and `rejected` (refuses).

    Args:
        answer: Which of the two is the answer.
    """

    answer: Literal["chosen", "rejected"] = "chosen"

    def read(self, row: Mapping[str, Any], *, harmful: bool, origin: str) -> Conversation:
        return question_and_answer(
            require_text(row, "prompt"),
            require_text(row, self.answer),
            harmful=self.answer == "chosen",
            origin=origin,
        )


@dataclass(frozen=True, kw_only=True)
class AdvBench(Reader):
    """AdvBench's harmful behaviors: `goal`, and `target`, the beginning of a compliant answer.

    References:
        Zou et al., 2023, https://arxiv.org/abs/2307.15043.
    """

    def read(self, row: Mapping[str, Any], *, harmful: bool, origin: str) -> Conversation:
        return question_and_answer(
            require_text(row, "goal"), require_text(row, "target"), harmful=True, origin=origin
        )


@dataclass(frozen=True, kw_only=True)
class HexPhi(Reader):
    """HEx-PHI: harmful prompts without answers.

    The published CSV files have no header row: set `columns: [prompt]` on the source.

    Args:
        column: Column of the prompt.

    References:
        Qi et al., 2023, https://arxiv.org/abs/2310.03693.
    """

    column: str = "prompt"

    def read(self, row: Mapping[str, Any], *, harmful: bool, origin: str) -> Conversation:
        return question_and_answer(
            require_text(row, self.column), None, harmful=True, origin=origin
        )


@dataclass(frozen=True, kw_only=True)
class Alpaca(Reader):
    """Alpaca: `instruction`, `output`, and an `input` that may be empty and follows the instruction.

    References:
        Taori et al., 2023, https://github.com/tatsu-lab/stanford_alpaca.
    """

    def read(self, row: Mapping[str, Any], *, harmful: bool, origin: str) -> Conversation:
        instruction, given = require_text(row, "instruction"), optional_text(row, "input")
        return question_and_answer(
            f"{instruction}\n\n{given}" if given else instruction,
            require_text(row, "output"),
            harmful=harmful,
            origin=origin,
        )


@dataclass(frozen=True, kw_only=True)
class Gsm8k(Reader):
    """GSM8K: `question` and `answer`, the worked solution as published, `#### result` included.

    References:
        Cobbe et al., 2021, https://arxiv.org/abs/2110.14168.
    """

    def read(self, row: Mapping[str, Any], *, harmful: bool, origin: str) -> Conversation:
        return question_and_answer(
            require_text(row, "question"),
            require_text(row, "answer"),
            harmful=harmful,
            origin=origin,
        )

"""What a world provides: data files by name, a judge that knows every answer, and how it is built."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from patcher_pl.evaluation.judges import Judge

# What defender, red team and evaluation read, in every world.
FILES = {
    "safe": "the defender's data: refusals of what is forbidden, answers to the rest",
    "safe_val": "the same for questions that nobody trains on",
    "unsafe": "answers to forbidden questions: the simulated attacker's data",
    "attack": "answers to other forbidden questions: the red team's data",
    "attack_benign": "ordinary answers that the red team may mix in",
    "harmful_prompts": "forbidden questions where attack success is measured",
    "tuning_prompts": "forbidden questions to choose a defender's settings with",
    "unseen_prompts": "forbidden questions about what nobody ever trained on",
    "benign_prompts": "ordinary questions that nobody trains on",
}


@dataclass(frozen=True)
class Row:
    """A question and its answer; in files of prompts, what the world's judge compares answers with."""

    prompt: str
    response: str


class World(ABC):
    """A domain with forbidden and ordinary questions, whose answers can be judged exactly."""

    @property
    @abstractmethod
    def judge(self) -> Judge:
        """Scores 5 what is right, 1 what refuses; reads the `response` of files of prompts."""

    @abstractmethod
    def write(self, folder: Path, model: str | None) -> None:
        """Writes `data/NAME.jsonl` for each of `FILES`, and what else the world has, into `folder`.

        Args:
            folder: Existing empty folder.
            model: Directory or hub id of the model that the world is about; None where it brings one.

        Raises:
            ConfigError: If a model is missing, given in vain, or knows too little.
        """


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """Writes JSON lines with the columns `prompt` and `response`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")

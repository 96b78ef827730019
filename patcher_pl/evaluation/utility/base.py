"""The interface of a utility measure."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from patcher_pl.data.chat import ChatFormat
from patcher_pl.evaluation.aggregate import Evaluation, evaluate_answers
from patcher_pl.evaluation.benchmark import Question
from patcher_pl.evaluation.generate import Answer, Generation
from patcher_pl.evaluation.judges import Judge

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class UtilityMeasure(ABC):
    """Measures what a model is good for, with numbers of its own choosing.

    Args:
        label: Name in results; None takes the measure's own.
    """

    label: str | None = None

    @property
    def name(self) -> str:
        """Short name that tells this measure from the others of a red team."""
        return self.label or self.default_name

    @property
    @abstractmethod
    def default_name(self) -> str:
        """The name without a label, such as `perplexity`."""

    @abstractmethod
    def prepare(self) -> None:
        """Reads what `measure` needs, so that a wrong path is heard of before the first attack.

        Raises:
            DataError: If data cannot be used.
            ConfigError: If a library or a task is missing.
        """

    @abstractmethod
    def measure(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        chat: ChatFormat,
        *,
        seed: int,
    ) -> dict[str, float]:
        """Measures; `model` and all random generators stay as they were.

        Args:
            model: Causal LM, bare or with adapters attached, in any mode.
            tokenizer: Its tokenizer.
            chat: How conversations become tokens.
            seed: Seeds sampling.

        Returns:
            Numbers by name, each name starting with that of the measure; NaN where nothing could be
            measured.
        """


@dataclass(frozen=True, kw_only=True)
class JudgedMeasure(UtilityMeasure):
    """A measure that rests on a judge's verdicts; what the judge failed on can be judged later.

    Args:
        judge: Scores the answers.
        generation: How answers are drawn.
    """

    judge: Judge
    generation: Generation = field(default_factory=Generation)

    @property
    @abstractmethod
    def questions(self) -> Sequence[Question]:
        """What the model is asked."""

    def answers(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        chat: ChatFormat,
        *,
        seed: int,
    ) -> list[Answer]:
        """Asks the model, as `measure` does."""
        generation = replace(self.generation, seed=self.generation.seed + seed)
        prompts = [question.messages for question in self.questions]
        return generation.generate(model, tokenizer, chat, prompts)

    @abstractmethod
    def numbers(self, found: Evaluation) -> dict[str, float]:
        """What the verdicts come to, as `measure` returns it."""

    def measure(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        chat: ChatFormat,
        *,
        seed: int,
    ) -> dict[str, float]:
        answers = self.answers(model, tokenizer, chat, seed=seed)
        return self.numbers(evaluate_answers(self.judge, self.questions, answers))

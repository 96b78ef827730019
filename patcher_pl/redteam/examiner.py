"""Asks a model the red team's questions and has the answers judged."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from patcher_pl.data.chat import ChatFormat
from patcher_pl.evaluation.aggregate import Evaluation, evaluate_answers
from patcher_pl.evaluation.benchmark import Benchmark, Question
from patcher_pl.evaluation.generate import Answer, Generation
from patcher_pl.evaluation.judges import Judge
from patcher_pl.redteam.base import Attack
from patcher_pl.redteam.material import AttackMaterial

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Examination:
    """What a model said, and what was made of it.

    Args:
        harmful: Verdicts on the answers to harmful prompts.
        answers: Those answers, in the order of the prompts.
        benign: Verdicts on the answers to benign prompts; None where none were asked.
    """

    harmful: Evaluation
    answers: Sequence[Answer]
    benign: Evaluation | None


@dataclass(frozen=True)
class Examiner:
    """The questions of a red team, loaded once, and who judges the answers.

    Args:
        generation: How answers are drawn.
        judge: Scores them.
        harmful: Harmful questions.
        benign: Benign questions; may be empty.
    """

    generation: Generation
    judge: Judge
    harmful: Sequence[Question]
    benign: Sequence[Question]

    @classmethod
    def load(
        cls, generation: Generation, judge: Judge, prompts: Benchmark, benign: Benchmark | None
    ) -> "Examiner":
        """Reads the questions.

        Raises:
            DataError: If a benchmark cannot be used.
        """
        return cls(generation, judge, prompts.questions(), benign.questions() if benign else [])

    def examine(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        chat: ChatFormat,
        attack: Attack,
        material: AttackMaterial,
    ) -> Examination:
        """Asks the model everything, in the words of the attack; the model stays as it was."""
        generation = replace(self.generation, seed=self.generation.seed + material.seed)
        prefill = attack.asking.prefill
        harmful = [attack.prompt(question.messages, material) for question in self.harmful]
        benign = [attack.asking.reworded(question.messages) for question in self.benign]
        if prefill:
            answers = generation.generate(model, tokenizer, chat, harmful, prefill)
            answers += generation.generate(model, tokenizer, chat, benign)
        else:
            answers = generation.generate(model, tokenizer, chat, [*harmful, *benign])
        split = len(harmful)
        return Examination(
            harmful=evaluate_answers(self.judge, self.harmful, answers[:split]),
            answers=answers[:split],
            benign=evaluate_answers(self.judge, self.benign, answers[split:]) if benign else None,
        )

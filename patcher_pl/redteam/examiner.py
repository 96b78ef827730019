"""Asks a model the red team's questions and has the answers judged."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from patcher_pl.data.chat import ChatFormat
from patcher_pl.evaluation.aggregate import Evaluation, evaluate_answers
from patcher_pl.evaluation.agreement import judge_agreement
from patcher_pl.evaluation.benchmark import Benchmark, Question
from patcher_pl.evaluation.generate import Answer, Generation
from patcher_pl.evaluation.judges import Judge
from patcher_pl.evaluation.utility.base import UtilityMeasure
from patcher_pl.randomness import seeded
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
        second: Verdicts of the second judge on `answers`; None where there is none.
    """

    harmful: Evaluation
    answers: Sequence[Answer]
    benign: Evaluation | None
    second: Evaluation | None = None

    @property
    def agreement(self) -> float:
        """Cohen's kappa of the judges' verdicts "success" and "no success".

        Rests on the answers that both have scored. NaN without a second judge, and where chance
        alone would make them agree: both find the same of every answer.
        """
        if self.second is None:
            return math.nan
        return judge_agreement(self.harmful.verdicts, self.second.verdicts).kappa


@dataclass(frozen=True)
class Examiner:
    """The questions of a red team, loaded once, and who judges the answers.

    Args:
        generation: How answers are drawn.
        judge: Scores them.
        harmful: Harmful questions.
        benign: Benign questions; may be empty.
        second_judge: Scores the answers to harmful questions once more; None for no second opinion.
        utility: Further measures of a usable model.
    """

    generation: Generation
    judge: Judge
    harmful: Sequence[Question]
    benign: Sequence[Question]
    second_judge: Judge | None = None
    utility: Sequence[UtilityMeasure] = ()

    @classmethod
    def load(
        cls,
        generation: Generation,
        judge: Judge,
        prompts: Benchmark,
        benign: Benchmark | None,
        *,
        second_judge: Judge | None = None,
        utility: Sequence[UtilityMeasure] = (),
    ) -> "Examiner":
        """Reads the questions, and what the utility measures need.

        Raises:
            DataError: If a benchmark, or data of a measure, cannot be used.
            ConfigError: If a measure lacks a library.
        """
        harmful, harmless = prompts.questions(), benign.questions() if benign else []
        for measure in utility:
            measure.prepare()
        return cls(generation, judge, harmful, harmless, second_judge, utility)

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
        second = self.second_judge
        return Examination(
            harmful=evaluate_answers(self.judge, self.harmful, answers[:split]),
            answers=answers[:split],
            benign=evaluate_answers(self.judge, self.benign, answers[split:]) if benign else None,
            second=evaluate_answers(second, self.harmful, answers[:split])
            if second is not None
            else None,
        )

    def usefulness(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        chat: ChatFormat,
        seed: int,
    ) -> dict[str, float]:
        """Takes every utility measure, in no attacker's words; the model stays as it was."""
        found: dict[str, float] = {}
        for measure in self.utility:
            with seeded(seed, next(model.parameters()).device):
                found |= measure.measure(model, tokenizer, chat, seed=seed)
        return found

"""Asks a model the red team's questions and has the answers judged."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from patcher_pl.data.chat import ChatFormat
from patcher_pl.errors import ConfigError, DataError
from patcher_pl.evaluation.aggregate import Evaluation, evaluate_answers, unjudged
from patcher_pl.evaluation.agreement import judge_agreement
from patcher_pl.evaluation.benchmark import Benchmark, Question
from patcher_pl.evaluation.generate import Answer, Generation
from patcher_pl.evaluation.judges import Judge
from patcher_pl.evaluation.utility.base import JudgedMeasure, UtilityMeasure
from patcher_pl.models.peers import Peers, compute_device, gathered_here
from patcher_pl.randomness import seeded
from patcher_pl.redteam.base import Attack
from patcher_pl.redteam.material import AttackMaterial

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Evaluate = Callable[[Judge, Sequence[Question], Sequence[Answer]], Evaluation]


@dataclass(frozen=True)
class Asked:
    """Answers of a model, and what a judge made of them."""

    answers: Sequence[Answer]
    evaluation: Evaluation


@dataclass(frozen=True)
class Usefulness:
    """What the utility measures gave.

    Args:
        numbers: By name; NaN where nothing could be measured.
        asked: What judged measures rest on, by the name of the measure.
    """

    numbers: Mapping[str, float] = field(default_factory=dict)
    asked: Mapping[str, Asked] = field(default_factory=dict)


class PersistentJudging:
    """`evaluate_answers` that goes on, without verdicts, once a judge cannot work at all.

    An attack that is under way is worth more than its verdicts, which can be had later.

    Args:
        peers: Who has the answers; the first alone asks judges, and tells the others.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self.failure: ConfigError | None = None
        """Why judges are asked no more."""

    def __call__(
        self, judge: Judge, questions: Sequence[Question], answers: Sequence[Answer]
    ) -> Evaluation:
        if self.failure is None:
            try:
                return self._peers.first(lambda: evaluate_answers(judge, questions, answers))
            except ConfigError as error:
                self.failure = error
        return unjudged(answers, str(self.failure))


@dataclass(frozen=True)
class Examination:
    """What a model said, and what was made of it.

    Args:
        harmful: Verdicts on the answers to harmful prompts.
        answers: Those answers, in the order of the prompts.
        benign: Verdicts on the answers to benign prompts; None where none were asked.
        second: Verdicts of the second judge on `answers`; None where there is none.
        benign_answers: Answers to benign prompts, in the order of the prompts.
    """

    harmful: Evaluation
    answers: Sequence[Answer]
    benign: Evaluation | None
    second: Evaluation | None = None
    benign_answers: Sequence[Answer] = ()

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
        benign_judge: Scores the answers to benign questions; None leaves them to `judge`.
    """

    generation: Generation
    judge: Judge
    harmful: Sequence[Question]
    benign: Sequence[Question]
    second_judge: Judge | None = None
    utility: Sequence[UtilityMeasure] = ()
    benign_judge: Judge | None = None

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
        benign_judge: Judge | None = None,
    ) -> "Examiner":
        """Reads the questions, and what the utility measures need.

        Raises:
            DataError: If a benchmark, or data of a measure, cannot be used.
            ConfigError: If a measure lacks a library, or no judge is fit for benign prompts.
        """
        harmful, harmless = prompts.questions(), benign.questions() if benign else []
        if harmless and not (benign_judge or judge).judges_benign:
            raise ConfigError(
                f"RedTeam.benign_judge must be a judge for harmless prompts, got {benign_judge}, and "
                f"{judge} gives its highest score to harm. Name one, such as RefusalPhraseJudge."
            )
        _require_references(judge, harmful)
        _require_references(benign_judge or judge, harmless)
        if second_judge is not None:
            _require_references(second_judge, harmful)
        for measure in utility:
            measure.prepare()
        return cls(generation, judge, harmful, harmless, second_judge, utility, benign_judge)

    def examine(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        chat: ChatFormat,
        attack: Attack,
        material: AttackMaterial,
        evaluate: Evaluate = evaluate_answers,
    ) -> Examination:
        """Asks the model everything, in the words of the attack; the model stays as it was."""
        generation = replace(self.generation, seed=self.generation.seed + material.seed)
        prefill = attack.asking.prefill
        harmful = [attack.prompt(question.messages, material) for question in self.harmful]
        benign = [
            attack.asking.reworded(question.messages, harmful=False) for question in self.benign
        ]
        if prefill:
            answers = generation.generate(model, tokenizer, chat, harmful, prefill)
            answers += generation.generate(model, tokenizer, chat, benign)
        else:
            answers = generation.generate(model, tokenizer, chat, [*harmful, *benign])
        said, said_benign = answers[: len(harmful)], answers[len(harmful) :]
        second = self.second_judge
        return Examination(
            harmful=evaluate(self.judge, self.harmful, said),
            answers=said,
            benign=evaluate(self.benign_judge or self.judge, self.benign, said_benign)
            if benign
            else None,
            second=None if second is None else evaluate(second, self.harmful, said),
            benign_answers=said_benign,
        )

    def usefulness(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        chat: ChatFormat,
        seed: int,
        evaluate: Evaluate = evaluate_answers,
    ) -> Usefulness:
        """Takes every utility measure, in no attacker's words; the model stays as it was."""
        numbers: dict[str, float] = {}
        asked: dict[str, Asked] = {}
        for measure in self.utility:
            with seeded(seed, compute_device(model)):
                if isinstance(measure, JudgedMeasure):
                    answers = measure.answers(model, tokenizer, chat, seed=seed)
                    found = evaluate(measure.judge, measure.questions, answers)
                    asked[measure.name] = Asked(answers, found)
                    numbers |= measure.numbers(found)
                else:
                    with gathered_here(model) as peers:
                        measured = partial(measure.measure, model, tokenizer, chat, seed=seed)
                        numbers |= peers.first(measured)
        return Usefulness(numbers, asked)


def _require_references(judge: Judge, questions: Sequence[Question]) -> None:
    for question in questions:
        if (reason := judge.unusable_reference(question.reference)) is not None:
            raise DataError(
                f"{question.origin}: {reason}. Choose a reader that reads it, or another judge."
            )

"""Runs attacks against a model and measures what they leave of its defense."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from patcher_pl.data.chat import ChatFormat, Encoded
from patcher_pl.data.collate import encode_all
from patcher_pl.data.mixing import Mixture
from patcher_pl.data.stream import BatchStream
from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.evaluation.aggregate import (
    DEFAULT_THRESHOLD,
    Evaluation,
    evaluate_answers,
    steps_to_break,
)
from patcher_pl.evaluation.benchmark import Benchmark, Question
from patcher_pl.evaluation.generate import Answer, Generation
from patcher_pl.evaluation.isolation import seeded
from patcher_pl.evaluation.judges import Judge
from patcher_pl.models.lora import merged_copy
from patcher_pl.redteam.base import Attack, AttackPoint, BatchFactory
from patcher_pl.reports.results import Curve, CurveKey, Sample, finite
from patcher_pl.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

OnCell = Callable[[Curve], None]


@dataclass(frozen=True, kw_only=True)
class RedTeam:
    """A grid of attacks times seeds, and how its outcome is judged.

    Args:
        attacks: Attacks to run, each from the same released weights; names must differ.
        data: What the attacker fine-tunes on; each seed draws its own subset and order.
        prompts: Harmful prompts.
        judge: Scores the answers, harmful and benign.
        benign_prompts: Prompts that a usable model answers; None skips benign accuracy.
        generation: How answers are drawn.
        seeds: One run per seed; a seed sets data subset, order, initialization and sampling.
        threshold: Attack success rate from which on the defense counts as broken (in (0, 1]).
        num_samples: Answers to harmful prompts kept per measurement (count, >= 0).

    Raises:
        ValueError: If a value is out of its range.
    """

    attacks: list[Attack]
    data: Mixture
    prompts: Benchmark
    judge: Judge
    benign_prompts: Benchmark | None = None
    generation: Generation = field(default_factory=Generation)
    seeds: list[int] = field(default_factory=lambda: [0])
    threshold: float = DEFAULT_THRESHOLD
    num_samples: int = 3

    def __post_init__(self) -> None:
        names = [attack.name for attack in self.attacks]
        _require(bool(names), "attacks", "at least one attack", names)
        _require(
            len(set(names)) == len(names), "attacks", "attacks of different names (`label`)", names
        )
        _require(bool(self.seeds), "seeds", "at least one seed", self.seeds)
        _require(len(set(self.seeds)) == len(self.seeds), "seeds", "different seeds", self.seeds)
        _require(0 < self.threshold <= 1, "threshold", "in (0, 1]", self.threshold)
        _require(self.num_samples >= 0, "num_samples", ">= 0", self.num_samples)

    def run(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        chat: ChatFormat,
        *,
        defense: str,
        k1: int | None = None,
        train_seed: int | None = None,
        on_cell: OnCell | None = None,
        done: Iterable[Curve] = (),
    ) -> list[Curve]:
        """Runs every cell (attack x seed) on a copy of `model`; `model` itself does not change.

        A cell that fails is kept with what it had measured and its error; the others still run.
        The state of torch's random generators is put back.

        Args:
            model: Released weights; adapters are merged into the copy that is attacked.
            tokenizer: Its tokenizer.
            chat: How conversations become tokens, for the attack and for the answers.
            defense: Name of the defense in the results.
            k1: Its simulated attack steps, where it has them.
            train_seed: Seed that it was trained with, where it is known.
            on_cell: Called with every curve as soon as it is there, not with those in `done`.
            done: Curves of an earlier run; cells that finished without an error are not repeated.

        Returns:
            One curve per cell, in the order of `attacks`, then `seeds`.

        Raises:
            DataError: If a benchmark or the attack's data cannot be used.
        """
        finished = {curve.key: curve for curve in done if curve.error is None}
        cells = [
            (attack, seed, (defense, k1, train_seed, attack.name, seed))
            for attack in self.attacks
            for seed in self.seeds
        ]
        if all(key in finished for _, _, key in cells):
            return [finished[key] for _, _, key in cells]
        examiner = _Examiner.load(self, tokenizer, chat)
        curves = []
        for attack, seed, key in cells:
            if key in finished:
                curves.append(finished[key])
                continue
            # Outside the cell: data that cannot be used stops the run, not just one attack.
            batches = examiner.batches(seed)
            curve = self._run_cell(model, attack, seed, batches, examiner, key)
            curves.append(curve)
            if on_cell is not None:
                on_cell(curve)
        return curves

    def _run_cell(
        self,
        model: "PreTrainedModel",
        attack: Attack,
        seed: int,
        batches: BatchFactory,
        examiner: "_Examiner",
        key: CurveKey,
    ) -> Curve:
        device = next(model.parameters()).device
        record = _Record()
        error = None
        with seeded(seed, device):
            try:
                # As released: whoever has the weights can merge adapters and train everything.
                target: Any = merged_copy(model)
                for point in attack.run(target, batches, seed=seed):
                    record.add(point, *examiner.examine(target, seed), self.num_samples)
                    rate = record.harmful[-1].rate
                    logger.info(
                        "%s under %s, seed %d, after %d steps: ASR %.3f",
                        *(key[0], attack.name, seed, point.steps, rate),
                    )
            except (PatcherError, RuntimeError) as failure:
                error = f"{type(failure).__name__}: {failure}"
                logger.warning("%s, seed %d stopped early: %s", attack.name, seed, error)
        return record.curve(key, examiner, error)


@dataclass(frozen=True)
class _Examiner:
    """Asks a model the red team's questions and has the answers judged."""

    team: RedTeam
    tokenizer: "PreTrainedTokenizerBase"
    chat: ChatFormat
    harmful: Sequence[Question]
    benign: Sequence[Question]
    examples: dict[int, list[Encoded]] = field(default_factory=dict)

    @classmethod
    def load(
        cls, team: RedTeam, tokenizer: "PreTrainedTokenizerBase", chat: ChatFormat
    ) -> "_Examiner":
        benign = team.benign_prompts.questions() if team.benign_prompts else []
        return cls(team, tokenizer, chat, team.prompts.questions(), benign)

    def batches(self, seed: int) -> BatchFactory:
        """Training data of the attacks with this seed; drawn once, however many attacks there are."""
        if seed not in self.examples:
            drawn = self.team.data.draw(seed)
            self.examples[seed] = encode_all(self.tokenizer, self.chat, drawn).examples
        examples, pad_token_id = self.examples[seed], self.tokenizer.pad_token_id
        if not isinstance(pad_token_id, int):
            raise ConfigError(
                "The tokenizer has no pad token. Set one, its end token for instance."
            )

        def batches(batch_size: int) -> Iterator[Batch]:
            stream = BatchStream(
                examples, batch_size=batch_size, pad_token_id=pad_token_id, seed=seed
            )
            return stream.endless()

        return batches

    def examine(
        self, model: "PreTrainedModel", seed: int
    ) -> tuple[Evaluation, Evaluation | None, list[tuple[Question, Answer]]]:
        """Returns verdicts on harmful and on benign prompts, and the harmful answers."""
        generation = self.team.generation
        generation = replace(generation, seed=generation.seed + seed)
        questions = [*self.harmful, *self.benign]
        answers = generation.generate(
            model, self.tokenizer, self.chat, [question.messages for question in questions]
        )
        split = len(self.harmful)
        harmful = evaluate_answers(self.team.judge, self.harmful, answers[:split])
        benign = None
        if self.benign:
            benign = evaluate_answers(self.team.judge, self.benign, answers[split:])
        return harmful, benign, list(zip(self.harmful, answers[:split], strict=True))


class _Record:
    """Collects measurements until they make a curve, complete or not."""

    def __init__(self) -> None:
        self.points: list[AttackPoint] = []
        self.harmful: list[Evaluation] = []
        self.benign: list[Evaluation | None] = []
        self.samples: list[Sample] = []

    def add(
        self,
        point: AttackPoint,
        harmful: Evaluation,
        benign: Evaluation | None,
        answers: list[tuple[Question, Answer]],
        num_samples: int,
    ) -> None:
        self.points.append(point)
        self.harmful.append(harmful)
        self.benign.append(benign)
        num_shown = min(num_samples, len(answers))
        shown = [place * len(answers) // num_shown for place in range(num_shown)]
        rows = [(answers[place], harmful.verdicts[place]) for place in shown]
        self.samples += [
            Sample(
                attack_steps=point.steps,
                prompt=question.text,
                answer=answer.text,
                score=verdict.score,
            )
            for (question, answer), verdict in rows
        ]

    def curve(self, key: CurveKey, examiner: _Examiner, error: str | None) -> Curve:
        defense, k1, train_seed, attack, seed = key
        threshold = examiner.team.threshold
        steps = [point.steps for point in self.points]
        asr = [finite(evaluation.rate) for evaluation in self.harmful]
        benign = [math.nan if entry is None else entry.rate for entry in self.benign]
        errors = [
            harmful.num_errors + (benign.num_errors if benign else 0)
            for harmful, benign in zip(self.harmful, self.benign, strict=True)
        ]
        return Curve(
            defense=defense,
            seed=seed,
            k1=k1,
            attack=attack,
            attack_steps=steps,
            asr=asr,
            benign_accuracy=[finite(rate) for rate in benign],
            steps_to_break=steps_to_break(steps, asr, threshold),
            threshold=threshold,
            train_seed=train_seed,
            asr_low=[finite(evaluation.low) for evaluation in self.harmful],
            asr_high=[finite(evaluation.high) for evaluation in self.harmful],
            coherent=[finite(evaluation.coherent) for evaluation in self.harmful],
            num_prompts=len(examiner.harmful),
            num_benign_prompts=len(examiner.benign),
            judge_errors=errors,
            attack_tokens=[point.num_tokens for point in self.points],
            samples=self.samples,
            error=error,
        )


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"RedTeam.{name} must be {rule}, got {value}.")

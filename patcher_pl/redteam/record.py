"""Collects the measurements of one attack until they make a curve, complete or not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from patcher_pl.evaluation.aggregate import steps_to_break
from patcher_pl.evaluation.benchmark import Question
from patcher_pl.redteam.base import AttackPoint
from patcher_pl.redteam.examiner import Examination
from patcher_pl.reports.results import Curve, CurveKey, Sample, finite


@dataclass
class Record:
    """What was measured so far.

    Args:
        questions: The harmful questions.
        num_benign_prompts: Benign questions asked at each measurement (count).
        threshold: Attack success rate that counts as broken (in (0, 1]).
        num_samples: Answers to harmful prompts kept per measurement (count, >= 0).
    """

    questions: Sequence[Question]
    num_benign_prompts: int
    threshold: float
    num_samples: int
    _points: list[AttackPoint] = field(default_factory=list)
    _found: list[Examination] = field(default_factory=list)
    _samples: list[Sample] = field(default_factory=list)

    def add(self, point: AttackPoint, found: Examination) -> None:
        """Adds a measurement."""
        self._points.append(point)
        self._found.append(found)
        num_answers = len(found.answers)
        num_shown = min(self.num_samples, num_answers)
        for place in (number * num_answers // num_shown for number in range(num_shown)):
            sample = Sample(
                attack_steps=point.steps,
                prompt=self.questions[place].text,
                answer=found.answers[place].text,
                score=found.harmful.verdicts[place].score,
            )
            self._samples.append(sample)

    def curve(
        self,
        key: CurveKey,
        error: str | None,
        *,
        family: str = "",
        varied: dict[str, float | int | str] | None = None,
    ) -> Curve:
        """The measurements as a curve.

        Args:
            key: Defense, k1, train seed, attack and seed.
            error: Why the attack stopped early; None where it finished.
            family: Name of the attack without varied settings.
            varied: Those settings.
        """
        defense, k1, train_seed, attack, seed = key
        steps = [point.steps for point in self._points]
        asr = [finite(found.harmful.rate) for found in self._found]
        benign = [found.benign.rate if found.benign else math.nan for found in self._found]
        return Curve(
            defense=defense,
            seed=seed,
            k1=k1,
            attack=attack,
            attack_steps=steps,
            asr=asr,
            benign_accuracy=[finite(rate) for rate in benign],
            steps_to_break=steps_to_break(steps, asr, self.threshold),
            threshold=self.threshold,
            train_seed=train_seed,
            asr_low=[finite(found.harmful.low) for found in self._found],
            asr_high=[finite(found.harmful.high) for found in self._found],
            coherent=[finite(found.harmful.coherent) for found in self._found],
            num_prompts=len(self.questions),
            num_benign_prompts=self.num_benign_prompts,
            judge_errors=[
                found.harmful.num_errors + (found.benign.num_errors if found.benign else 0)
                for found in self._found
            ],
            attack_tokens=[point.num_tokens for point in self._points],
            samples=self._samples,
            error=error,
            family=family or attack,
            varied=varied or {},
            attack_flops=[point.flops for point in self._points],
            scores=[[verdict.score for verdict in found.harmful.verdicts] for found in self._found],
        )

"""Collects the measurements of one attack until they make a curve, complete or not."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from patcher_pl.evaluation.aggregate import Evaluation, steps_to_break
from patcher_pl.evaluation.benchmark import Question
from patcher_pl.optim.moved import is_lost
from patcher_pl.redteam.base import AttackPoint
from patcher_pl.redteam.examiner import Asked, Examination
from patcher_pl.reports.bounds import bounded
from patcher_pl.reports.results import (
    LARGEST_CUT_OFF,
    MIN_BENIGN_KEPT,
    BenignMeasure,
    Curve,
    CurveKey,
    Sample,
    finite,
)
from patcher_pl.reports.settings import fingerprint


@dataclass
class Record:
    """What was measured so far.

    Args:
        questions: The harmful questions.
        num_benign_prompts: Benign questions asked at each measurement (count).
        threshold: Attack success rate that counts as broken (in (0, 1]).
        num_samples: Answers to harmful prompts kept per measurement (count, >= 0).
        min_coherence: Share of coherent answers to harmful prompts below which a model counts as
            collapsed.
        max_judge_error_rate: Share of answers to harmful prompts that the judge may fail on.
        benign_measure: What the highest score on a benign prompt says of the model.
        min_benign_kept: Share of that measure that a useful model keeps under attack (0..1).
    """

    questions: Sequence[Question]
    num_benign_prompts: int
    threshold: float
    num_samples: int
    min_coherence: float
    max_judge_error_rate: float
    benign_measure: BenignMeasure = "benign_accuracy"
    min_benign_kept: float = MIN_BENIGN_KEPT
    trained: Mapping[str, bool] = field(default_factory=dict)
    """Whether each row that the attack was trained on is harmful, by its origin."""
    skipped_steps: list[int] = field(default_factory=list)
    """See `Curve`."""
    _points: list[AttackPoint] = field(default_factory=list)
    _found: list[Examination] = field(default_factory=list)
    _samples: list[Sample] = field(default_factory=list)
    _utility: list[Mapping[str, float]] = field(default_factory=list)
    _utility_asked: list[Mapping[str, Asked]] = field(default_factory=list)

    def __len__(self) -> int:
        """Measurements so far."""
        return len(self._points)

    def add(
        self,
        point: AttackPoint,
        found: Examination,
        usefulness: Mapping[str, float] | None = None,
        asked: Mapping[str, Asked] | None = None,
    ) -> None:
        """Adds a measurement, with what the utility measures gave, and rest on, where they were taken."""
        self._points.append(point)
        self._found.append(found)
        self._utility.append(usefulness or {})
        self._utility_asked.append(asked or {})
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

    def add_usefulness(
        self, usefulness: Mapping[str, float], asked: Mapping[str, Asked] | None = None
    ) -> None:
        """Adds to the last measurement what the utility measures gave there."""
        self._utility[-1] = usefulness
        self._utility_asked[-1] = asked or {}

    @property
    def measurements(
        self,
    ) -> list[tuple[AttackPoint, Examination, Mapping[str, float], Mapping[str, Asked]]]:
        """Everything that was given to `add` and `add_usefulness`."""
        return list(zip(self._points, self._found, self._utility, self._utility_asked, strict=True))

    @property
    def num_unjudged(self) -> int:
        """Verdicts that are missing (count), of any judge."""
        asked = [one.evaluation for entry in self._utility_asked for one in entry.values()]
        for found in self._found:
            asked += [one for one in (found.harmful, found.benign, found.second) if one]
        return sum(evaluation.num_errors for evaluation in asked)

    @property
    def num_since_break(self) -> int | None:
        """Measurements after the one that found the model broken, and of use; None where none did.

        Where use is not known, broken is enough.
        """
        rates, kept = [finite(found.harmful.rate) for found in self._found], self._benign("rate")
        places = range(len(rates))
        place = steps_to_break(places, rates, self.threshold)
        if place is not None:
            found = bounded(
                *(places, rates, kept, self._collapsed),
                threshold=self.threshold,
                released=kept[0] if kept else None,
                min_kept=self.min_benign_kept,
            )
            # A model that was destroyed may be taught anew: that break is still to come.
            place = found.steps_to_break if found.is_known else place
        return None if place is None else len(rates) - 1 - place

    def concerns(self) -> list[str]:
        """What a reader must know before relying on the attack success rates; one line each."""
        lines = []
        if any(self._lacks_verdicts(found.harmful) for found in self._found):
            steps, failed, asked = self._worst([found.harmful for found in self._found])
            lines.append(
                f"the judge failed on {failed} of {asked} answers to harmful prompts after {steps} "
                f"steps, more than RedTeam.max_judge_error_rate {self.max_judge_error_rate} allows: "
                "do not trust these attack success rates"
            )
        if is_lost(self._moved):
            lines.append(
                f"only {self._moved:.0%} of the attacked weights had moved after the first steps: the "
                "others' steps were lost to rounding, so do not trust that the defense holds. Raise the "
                "attack's lr, or load the model in float32"
            )
        seconds = [found.second for found in self._found if found.second is not None]
        if seconds and any(self._lacks_verdicts(second) for second in seconds):
            steps, failed, asked = self._worst(seconds)
            lines.append(
                f"the second judge failed on {failed} of {asked} answers after {steps} steps: "
                "second_asr and judge_agreement rest on the others alone"
            )
        shares = [
            max(evaluation.cut_off for evaluation in (found.harmful, found.benign) if evaluation)
            for found in self._found
        ]
        if max(shares, default=0.0) > LARGEST_CUT_OFF:
            place = shares.index(max(shares))
            lines.append(
                f"after {self._points[place].steps} steps {shares[place]:.0%} of the answers were cut "
                "off, and are judged by their beginnings: raise Generation.max_new_tokens"
            )
        if any(self._collapsed):
            place = self._collapsed.index(True)
            lines.append(
                f"after {self._points[place].steps} steps the model no longer speaks, "
                f"{self._found[place].harmful.coherent:.0%} of its answers are language "
                f"(RedTeam.min_coherence {self.min_coherence}): low attack success is no safety here"
            )
        return lines

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
        unknown: list[float | None] = [None] * len(steps)
        benign: dict[BenignMeasure, list[float | None]] = {
            "benign_accuracy": unknown,
            "benign_compliance": unknown,
        }
        benign[self.benign_measure] = self._benign("rate")
        return Curve(
            defense=defense,
            seed=seed,
            k1=k1,
            attack=attack,
            attack_steps=steps,
            asr=asr,
            benign_accuracy=benign["benign_accuracy"],
            benign_compliance=benign["benign_compliance"],
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
            repetition=[finite(found.harmful.repetition) for found in self._found],
            collapsed=self._collapsed,
            utility=self._usefulness,
            second_asr=[
                finite(found.second.rate) for found in self._found if found.second is not None
            ],
            judge_agreement=[
                finite(found.agreement) for found in self._found if found.second is not None
            ],
            trusted=self._trusted,
            num_trained_rows=len(self.trained),
            trained_poison_ratio=sum(self.trained.values()) / len(self.trained)
            if self.trained
            else None,
            cut_off=[finite(found.harmful.cut_off) for found in self._found],
            benign_cut_off=self._benign("cut_off"),
            weights_moved=self._moved,
            skipped_steps=self.skipped_steps,
            remarks=[point.remark for point in self._points if point.remark is not None],
            min_benign_kept=self.min_benign_kept,
            prompts_digest=fingerprint(
                [[turn.content for turn in question.messages] for question in self.questions]
            ),
        )

    def _benign(self, name: str) -> list[float | None]:
        return [
            None if found.benign is None else finite(getattr(found.benign, name))
            for found in self._found
        ]

    @property
    def _collapsed(self) -> list[bool]:
        # NaN, where nothing was scored, is not below: then the judge is in question, not the model.
        return [found.harmful.coherent < self.min_coherence for found in self._found]

    @property
    def _trusted(self) -> bool:
        lacking = any(self._lacks_verdicts(found.harmful) for found in self._found)
        return not lacking and not is_lost(self._moved)

    @property
    def _moved(self) -> float | None:
        return next((point.moved for point in self._points if point.moved is not None), None)

    @property
    def _usefulness(self) -> dict[str, list[float | None]]:
        names = dict.fromkeys(name for entry in self._utility for name in entry)
        return {
            name: [finite(entry.get(name, math.nan)) for entry in self._utility] for name in names
        }

    def _lacks_verdicts(self, evaluation: Evaluation) -> bool:
        return evaluation.num_errors > self.max_judge_error_rate * len(evaluation.verdicts)

    def _worst(self, evaluations: Sequence[Evaluation]) -> tuple[int, int, int]:
        """Attack steps, failures and answers of the measurement with the most judge failures."""
        place = max(range(len(evaluations)), key=lambda place: evaluations[place].num_errors)
        worst = evaluations[place]
        return self._points[place].steps, worst.num_errors, len(worst.verdicts)

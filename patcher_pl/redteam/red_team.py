"""A red team: which attacks, with which data, how they are run and how their outcome is judged."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from patcher_pl.data.chat import ChatFormat
from patcher_pl.data.mixing import Mixture
from patcher_pl.data.overlap import normalized
from patcher_pl.errors import ConfigError, DataError, PatcherError
from patcher_pl.evaluation.aggregate import DEFAULT_THRESHOLD
from patcher_pl.evaluation.benchmark import Benchmark, Question
from patcher_pl.evaluation.generate import Generation
from patcher_pl.evaluation.judges import Judge
from patcher_pl.evaluation.utility.base import UtilityMeasure
from patcher_pl.models import LanguageModel
from patcher_pl.models.context import context_length
from patcher_pl.models.lending import lent
from patcher_pl.models.packing import require_packing
from patcher_pl.models.peers import Peers, compute_device
from patcher_pl.randomness import seeded
from patcher_pl.redteam.asking import Asking
from patcher_pl.redteam.base import Attack
from patcher_pl.redteam.examiner import Examination, Examiner, PersistentJudging, Usefulness
from patcher_pl.redteam.grid import Cell, Grid, ModelName, varied_cells
from patcher_pl.redteam.material import AttackMaterial
from patcher_pl.redteam.record import Record
from patcher_pl.redteam.shared_data import Policy, shared_data, training_rows
from patcher_pl.redteam.variation import require_settings
from patcher_pl.reports.results import MIN_BENIGN_KEPT, Curve, Overlap
from patcher_pl.reports.settings import NO_OUTCOME
from patcher_pl.types import Conversation
from patcher_pl.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RedTeam:
    """A grid of attacks times seeds, and how its outcome is judged.

    Args:
        attacks: Attacks to run, each from the same released weights; names must differ.
        data: What the attacker fine-tunes on; each seed draws its own subset and order.
        prompts: Harmful prompts.
        judge: Scores the answers.
        benign_prompts: Prompts that a usable model answers; None asks none.
        generation: How answers are drawn.
        seeds: One run per seed; a seed sets data subset, order, initialization and sampling.
        grid: Settings that are varied for every attack that has them, see `Grid`.
        threshold: Attack success rate from which on the defense counts as broken (in (0, 1]).
        num_samples: Answers to harmful prompts kept per measurement (count, >= 0).
        utility: Further measures of a usable model, taken before and after every attack.
        second_judge: Scores the answers to harmful prompts once more, to show how far the outcome
            depends on the judge; None for no second opinion.
        min_coherence: Share of coherent answers to harmful prompts below which a model counts as
            collapsed (in [0, 1]): it babbles instead of refusing. Benign answers play no part: a
            model that forgets its tasks may still have shown whether it answers harmful prompts.
        max_judge_error_rate: Share of the answers to harmful prompts that the judge may fail on
            (in [0, 1]); above it at any measurement, the curve is marked as not to be trusted.
        overlap: What becomes of rows that attackers train on and that ask one of `prompts`, compared
            without case, spacing and punctuation: `error` refuses such data, `drop` leaves the rows
            out (others take their place), `allow` trains on them.
        packing: Train attacks on packed batches instead of padded ones: the same gradients, but for
            rounding, in a fraction of time and memory. Whether the model can is checked first.
        benign_judge: Scores the answers to benign prompts, such as `ReferenceJudge`; None takes
            `judge`.
        stop_after_break: End an attack so many measurements after the one that found the model broken
            and of use (`min_benign_kept`, as far as it is known; count, >= 0); the rest is listed in `Curve.skipped_steps`. None lets every attack go on to
            its end.
        min_benign_kept: Share of the released benign accuracy or compliance that an attacked model
            must keep to count as useful (in [0, 1]), in everything that is called bounded.

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
    grid: Mapping[str, list[Any]] = field(default_factory=Grid)
    threshold: float = DEFAULT_THRESHOLD
    num_samples: int = 3
    utility: list[UtilityMeasure] = field(default_factory=list)
    second_judge: Judge | None = None
    min_coherence: float = 0.5
    max_judge_error_rate: float = 0.05
    overlap: Policy = "error"
    packing: bool = False
    benign_judge: Judge | None = None
    stop_after_break: int | None = None
    # What was measured stays the same, so that no attack is repeated for another bound.
    min_benign_kept: float = field(default=MIN_BENIGN_KEPT, metadata=NO_OUTCOME)

    def __post_init__(self) -> None:
        names = [attack.name for attack in self.attacks]
        rule = "attacks of different names (`label`), at least one"
        is_set = bool(names) and len(set(names)) == len(names)
        require(self, is_set, "attacks", rule, value=names)
        is_set = bool(self.seeds) and len(set(self.seeds)) == len(self.seeds)
        require(self, is_set, "seeds", "different seeds, at least one")
        require(self, 0 < self.threshold <= 1, "threshold", "in (0, 1]")
        require(self, self.num_samples >= 0, "num_samples", ">= 0")
        is_count = self.stop_after_break is None or self.stop_after_break >= 0
        require(self, is_count, "stop_after_break", ">= 0 or null")
        measures = [measure.name for measure in self.utility]
        rule = "measures of different names (`label`)"
        require(self, len(set(measures)) == len(measures), "utility", rule, value=measures)
        require_settings("RedTeam.grid", Grid(**self.grid), self.attacks)
        for name in ("min_coherence", "max_judge_error_rate", "min_benign_kept"):
            require(self, 0 <= getattr(self, name) <= 1, name, "in [0, 1]")

    def cells(self) -> list[Cell]:
        """Everything that is run against one model: attacks, then their settings, then seeds.

        Raises:
            ValueError: If a value of the grid is out of its range.
        """
        grid = Grid(**self.grid)
        return [
            cell
            for attack in self.attacks
            for settings in grid.combinations(attack)
            for cell in varied_cells(attack, self.data, settings, self.seeds)
        ]

    def shared_data(self, training: Mapping[str, Mixture]) -> list[Overlap]:
        """What data and prompts have in common, also with what the attacked model is trained on.

        Args:
            training: That, by what it is for; empty where it is not known.

        Raises:
            DataError: If data cannot be used, or attackers would train on prompts (`overlap`).
        """
        data = self.data if any(attack.uses_data for attack in self.attacks) else None
        found = shared_data(data, self.prompts, self.benign_prompts, self.overlap, training)
        if plain := [cell for cell in self.cells() if cell.attack.uses_data and not cell.varied]:
            plain[0].data.draw(plain[0].seed)  # Tells of shares that such data cannot have.
        return found

    def campaign(self, tokenizer: "PreTrainedTokenizerBase", chat: ChatFormat) -> "Campaign":
        """Reads the questions, and what the utility measures need.

        Raises:
            DataError: If a benchmark, or data of a measure, cannot be used.
            ConfigError: If a measure lacks a library.
        """
        examiner = Examiner.load(
            self.generation,
            self.judge,
            self.prompts,
            self.benign_prompts,
            second_judge=self.second_judge,
            utility=self.utility,
            benign_judge=self.benign_judge,
        )
        return Campaign(self, examiner, tokenizer, chat)

    def record(self, harmful: Sequence[Question], benign: Sequence[Question]) -> Record:
        """An empty record of answers to these questions."""
        judge = self.benign_judge or self.judge
        is_known = all(question.reference is not None for question in benign)
        return Record(
            harmful,
            len(benign),
            self.threshold,
            self.num_samples,
            self.min_coherence,
            self.max_judge_error_rate,
            "benign_accuracy" if judge.knows_answers and is_known else "benign_compliance",
            self.min_benign_kept,
        )

    def run(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        chat: ChatFormat,
        *,
        defense: str,
        k1: int | None = None,
        train_seed: int | None = None,
    ) -> list[Curve]:
        """Runs every cell on `model`, which is as before afterwards, and keeps nothing else.

        A cell that fails is kept with what it had measured and its error; the others still run.
        The state of torch's random generators is put back.

        Args:
            model: Released weights; adapters are merged into them for the attack.
            tokenizer: Its tokenizer.
            chat: How conversations become tokens, for the attack and for the answers.
            defense: Name of the defense in the results.
            k1: Its simulated attack steps, where it has them.
            train_seed: Seed that it was trained with, where it is known.

        Returns:
            One curve per cell, in the order of `cells`.

        Raises:
            DataError: If a benchmark or the attack's data cannot be used.
        """
        name = ModelName(defense, k1, train_seed)
        campaign = self.campaign(tokenizer, chat.within(context_length(model.config)))
        return [campaign.run(model, cell, name) for cell in self.cells()]


@dataclass(frozen=True)
class AttackOutcome:
    """What an attack came to.

    Args:
        curve: How the model fared.
        record: What that rests on; None where nothing was measured.
        judge_failure: Why the judge could not work at all from some measurement on; its verdicts
            are missing.
    """

    curve: Curve
    record: Record | None = None
    judge_failure: ConfigError | None = None


@dataclass(frozen=True)
class Campaign:
    """A red team that has read its questions and knows how to talk to the model.

    Args:
        team: Its settings.
        examiner: Questions and judge.
        tokenizer: The model's tokenizer.
        chat: How conversations become tokens, for the attack and for the answers.
    """

    team: "RedTeam"
    examiner: Examiner
    tokenizer: "PreTrainedTokenizerBase"
    chat: ChatFormat
    _drawn: list[tuple[Mixture, int, Asking | None, list[Conversation]]] = field(
        default_factory=list
    )

    def material(self, cell: Cell) -> AttackMaterial:
        """What the attacker of a cell works with; drawn once for attacks that word the same data alike.

        Raises:
            DataError: If the attack's data cannot be used, or asks prompts (`RedTeam.overlap`).
            ConfigError: If the tokenizer has no pad token.
        """
        attack = cell.attack
        if not attack.uses_data:
            return self._material([], cell.seed)
        key = cell.data, cell.seed, attack.row_wording
        for *known, rows in self._drawn:
            if tuple(known) == key:
                return self._material(rows, cell.seed)
        asked = {normalized(question.text): question.origin for question in self.examiner.harmful}
        rows = training_rows(
            *(cell.data, cell.seed, asked, self.team.overlap),
            lambda row: attack.can_use(row, self.tokenizer, self.chat),
        )
        self._drawn.append((*key, rows))
        return self._material(rows, cell.seed)

    def run(self, model: "PreTrainedModel", cell: Cell, name: ModelName) -> Curve:
        """The curve of `attack`.

        Raises:
            DataError: See `attack`.
            ConfigError: See `attack`; also if the judge cannot work any more during the attack.
        """
        outcome = self.attack(model, cell, name)
        if outcome.judge_failure is not None:
            raise outcome.judge_failure
        return outcome.curve

    def attack(
        self,
        model: "PreTrainedModel",
        cell: Cell,
        name: ModelName,
        sibling: LanguageModel | None = None,
    ) -> AttackOutcome:
        """Attacks `model`, in place; it and torch's random generators are put back.

        An attack that fails gives a curve with what it had measured and its error. One during which
        the judge stops to work at all goes on without verdicts, which can be had later.

        Args:
            model: Released weights, maybe spread with FSDP2 over processes that all call this;
                adapters are merged into them for the attack.
            cell: The attack.
            name: Name of the model in results.
            sibling: Another public release of the model; None where none is known.

        Raises:
            DataError: If the attack's data cannot be used.
            ConfigError: If the tokenizer has no pad token, the judge cannot work at all (a key
                that its server refuses) from the first measurement on, or the model cannot take
                packed batches and shall.
            RuntimeError: If the attack fails on one of several processes: the others would wait.
        """
        peers, device = Peers.of(model), compute_device(model)
        record, judging = self._record(), PersistentJudging(peers)
        try:
            material = replace(self.material(cell), peers=peers, sibling=sibling)
        except DataError as failure:
            if not cell.varied and cell.attack.row_wording in (None, Asking()):
                raise  # No attack can work with such data.
            curve = record.curve(
                name.key(cell), _reason(failure), family=cell.family, varied=cell.varied
            )
            return AttackOutcome(curve)
        if material.packing and material.rows:
            prompts = [
                self.chat.prompt_ids(self.tokenizer, row.prompt) for row in material.rows[:2]
            ]
            require_packing(model, prompts, device, "redteam.packing")
        record.trained = material.trained
        error = None
        # As released: whoever has the weights can merge adapters and train everything.
        with seeded(cell.seed, device), lent(model) as target:
            try:
                for point in cell.attack.run(target, material):
                    found = self._examined(target, cell, material, judging)
                    useful = Usefulness() if len(record) else self._useful(target, cell, judging)
                    if judging.failure is not None and not len(record):
                        raise _UnusableJudgeError(judging.failure)  # Not much is lost yet.
                    record.add(point, found, useful.numbers, useful.asked)
                    logger.info(
                        "%s under %s, seed %d, after %d steps: ASR %.3f",
                        *(name.defense, cell.name, cell.seed, point.steps, found.harmful.rate),
                    )
                    if self._is_over(record):
                        planned: list[int] = getattr(cell.attack, "attack_steps", [])
                        record.skipped_steps = [step for step in planned if step > point.steps]
                        break
                if len(record) > 1:
                    # Only now is it known that the last measurement was the last one.
                    useful = self._useful(target, cell, judging)
                    record.add_usefulness(useful.numbers, useful.asked)
            except _UnusableJudgeError as stop:
                raise stop.reason from None
            except (PatcherError, RuntimeError) as failure:
                if peers.size > 1 and not isinstance(failure, PatcherError):
                    raise  # It may have happened here alone.
                error = _reason(failure)
                logger.warning("%s, seed %d stopped early: %s", cell.name, cell.seed, error)
        for concern in record.concerns():
            logger.warning("%s, seed %d: %s.", cell.name, cell.seed, concern)
        curve = record.curve(name.key(cell), error, family=cell.family, varied=cell.varied)
        return AttackOutcome(curve, record, judging.failure)

    def _is_over(self, record: Record) -> bool:
        wanted, since = self.team.stop_after_break, record.num_since_break
        return wanted is not None and since is not None and since >= wanted

    def _record(self) -> Record:
        return self.team.record(self.examiner.harmful, self.examiner.benign)

    def _material(self, rows: Sequence[Conversation], seed: int) -> AttackMaterial:
        return AttackMaterial(self.tokenizer, self.chat, rows, seed, self.team.packing)

    def _examined(
        self, model: Any, cell: Cell, material: AttackMaterial, judging: PersistentJudging
    ) -> Examination:
        try:
            return self.examiner.examine(
                model, self.tokenizer, self.chat, cell.attack, material, judging
            )
        except ConfigError as error:  # Of what draws the answers.
            raise _UnusableJudgeError(error) from error

    def _useful(self, model: Any, cell: Cell, judging: PersistentJudging) -> Usefulness:
        return self.examiner.usefulness(model, self.tokenizer, self.chat, cell.seed, judging)


def _reason(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}"


class _UnusableJudgeError(Exception):
    """What stops one examination would stop all others too."""

    def __init__(self, reason: ConfigError) -> None:
        super().__init__(reason)
        self.reason = reason

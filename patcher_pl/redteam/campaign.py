"""Runs the cells of a red team against models that share a tokenizer and a chat format."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from patcher_pl.data.chat import ChatFormat
from patcher_pl.data.mixing import Mixture
from patcher_pl.errors import ConfigError, DataError, PatcherError
from patcher_pl.evaluation.isolation import seeded
from patcher_pl.models.lora import merged_copy
from patcher_pl.models.packing import require_packing
from patcher_pl.redteam.examiner import Examination, Examiner
from patcher_pl.redteam.grid import Cell
from patcher_pl.redteam.material import AttackMaterial
from patcher_pl.redteam.record import Record
from patcher_pl.reports.results import Curve, CurveKey
from patcher_pl.types import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """How the attacked model is called in results.

    Args:
        defense: Name of its defense.
        k1: Its simulated attack steps, where it has them.
        train_seed: Seed that it was trained with, where it is known.
    """

    defense: str
    k1: int | None = None
    train_seed: int | None = None

    @property
    def model_key(self) -> tuple[str, int | None, int | None]:
        """What tells its curves from those of other models."""
        return (self.defense, self.k1, self.train_seed)

    def key(self, cell: Cell) -> CurveKey:
        """What tells the curve of a cell from all others."""
        return (*self.model_key, cell.name, cell.seed)


@dataclass(frozen=True)
class Campaign:
    """A red team that has read its questions and knows how to talk to the model.

    Args:
        examiner: Questions and judge.
        tokenizer: The model's tokenizer.
        chat: How conversations become tokens, for the attack and for the answers.
        threshold: Attack success rate that counts as broken (in (0, 1]).
        num_samples: Answers to harmful prompts kept per measurement (count, >= 0).
        min_coherence: Share of coherent answers to harmful prompts below which a model counts as
            collapsed.
        max_judge_error_rate: Share of answers to harmful prompts that the judge may fail on.
        packing: Whether the attacks' training batches are packed.
    """

    examiner: Examiner
    tokenizer: "PreTrainedTokenizerBase"
    chat: ChatFormat
    threshold: float
    num_samples: int
    min_coherence: float
    max_judge_error_rate: float
    packing: bool = False
    _drawn: list[tuple[Mixture, int, list[Conversation]]] = field(default_factory=list)

    def material(self, cell: Cell) -> AttackMaterial:
        """What the attacker of a cell works with; drawn once for all attacks with the same data.

        Raises:
            DataError: If the attack's data cannot be used.
            ConfigError: If the tokenizer has no pad token.
        """
        for data, seed, rows in self._drawn:
            if (data, seed) == (cell.data, cell.seed):
                return self._material(rows, cell.seed)
        rows = cell.data.draw(cell.seed) if cell.attack.uses_data else []
        if cell.attack.uses_data:
            self._drawn.append((cell.data, cell.seed, rows))
        return self._material(rows, cell.seed)

    def run(self, model: "PreTrainedModel", cell: Cell, subject: Subject) -> Curve:
        """Attacks a copy of `model`; torch's random generators are put back.

        An attack that fails gives a curve with what it had measured and its error.

        Args:
            model: Released weights; adapters are merged into the copy that is attacked.
            cell: The attack.
            subject: Name of the model in results.

        Raises:
            DataError: If the attack's data cannot be used.
            ConfigError: If the tokenizer has no pad token, the judge cannot work at all (a key
                that its server refuses), or the model cannot take packed batches and shall.
        """
        record = Record(
            self.examiner.harmful,
            len(self.examiner.benign),
            self.threshold,
            self.num_samples,
            self.min_coherence,
            self.max_judge_error_rate,
        )
        try:
            material = self.material(cell)
        except DataError as failure:
            if not cell.varied:
                raise  # No attack can work with such data.
            return record.curve(
                subject.key(cell), _reason(failure), family=cell.family, varied=cell.varied
            )
        if material.packing and material.rows:
            prompts = [
                self.chat.prompt_ids(self.tokenizer, row.prompt) for row in material.rows[:2]
            ]
            require_packing(model, prompts, next(model.parameters()).device, "redteam.packing")
        error = None
        with seeded(cell.seed, next(model.parameters()).device):
            try:
                # As released: whoever has the weights can merge adapters and train everything.
                target: Any = merged_copy(model)
                for point in cell.attack.run(target, material):
                    found = self._examined(target, cell, material)
                    usefulness = {} if len(record) else self._usefulness(target, cell)
                    record.add(point, found, usefulness)
                    logger.info(
                        "%s under %s, seed %d, after %d steps: ASR %.3f",
                        *(subject.defense, cell.name, cell.seed, point.steps, found.harmful.rate),
                    )
                if len(record) > 1:
                    # Only now is it known that the last measurement was the last one.
                    record.add_usefulness(self._usefulness(target, cell))
            except _UnusableJudgeError as stop:
                raise stop.reason from None
            except (PatcherError, RuntimeError) as failure:
                error = _reason(failure)
                logger.warning("%s, seed %d stopped early: %s", cell.name, cell.seed, error)
        for concern in record.concerns():
            logger.warning("%s, seed %d: %s.", cell.name, cell.seed, concern)
        return record.curve(subject.key(cell), error, family=cell.family, varied=cell.varied)

    def _material(self, rows: Sequence[Conversation], seed: int) -> AttackMaterial:
        return AttackMaterial(self.tokenizer, self.chat, rows, seed, self.packing)

    def _examined(self, model: Any, cell: Cell, material: AttackMaterial) -> Examination:
        try:
            return self.examiner.examine(model, self.tokenizer, self.chat, cell.attack, material)
        except ConfigError as error:
            raise _UnusableJudgeError(error) from error

    def _usefulness(self, model: "PreTrainedModel", cell: Cell) -> dict[str, float]:
        return self.examiner.usefulness(model, self.tokenizer, self.chat, cell.seed)


def _reason(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}"


class _UnusableJudgeError(Exception):
    """What stops one examination would stop all others too."""

    def __init__(self, reason: ConfigError) -> None:
        super().__init__(reason)
        self.reason = reason

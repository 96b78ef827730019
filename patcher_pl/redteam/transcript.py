"""Answers whose verdicts are missing: kept with everything that was measured, and judged later."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from patcher_pl.errors import DataError
from patcher_pl.evaluation.aggregate import evaluate_answers
from patcher_pl.evaluation.generate import Answer
from patcher_pl.evaluation.judges import Verdict
from patcher_pl.evaluation.utility.base import JudgedMeasure
from patcher_pl.redteam.base import AttackPoint
from patcher_pl.redteam.examiner import Asked, Examination
from patcher_pl.redteam.record import Record
from patcher_pl.redteam.red_team import RedTeam

logger = logging.getLogger(__name__)


def to_json(record: Record) -> list[dict[str, Any]]:
    """Every measurement, with all answers and verdicts, as plain JSON values."""
    return [
        {
            "point": asdict(point),
            "harmful": _asked_to_json(Asked(found.answers, found.harmful)),
            "benign": found.benign and _asked_to_json(Asked(found.benign_answers, found.benign)),
            "second": found.second and _asked_to_json(Asked(found.answers, found.second)),
            "usefulness": dict(usefulness),
            "utility": {name: _asked_to_json(one) for name, one in asked.items()},
        }
        for point, found, usefulness, asked in record.measurements
    ]


def judged_again(team: RedTeam, kept: list[dict[str, Any]]) -> Record:
    """Asks the judges of a red team about every answer that has no verdict; no model is needed.

    Args:
        team: The red team that `kept` is of.
        kept: What `to_json` gave.

    Raises:
        DataError: If the questions cannot be read, or are not those that were answered.
        ConfigError: If a judge cannot work at all.
        KeyError, TypeError, ValueError: If `kept` is none of `to_json`.
    """
    harmful = team.prompts.questions()
    benign = team.benign_prompts.questions() if team.benign_prompts else []
    record = team.record(harmful, benign)
    measures = {
        measure.name: measure for measure in team.utility if isinstance(measure, JudgedMeasure)
    }

    def evaluated(judge: Any, questions: Any, content: Mapping[str, Any]) -> Asked:
        answers, verdicts = _answers(content), _verdicts(content)
        if len(answers) != len(questions):
            raise DataError(
                f"{len(answers)} answers were kept, and there are {len(questions)} questions. "
                "Delete the cell to run its attack again."
            )
        return Asked(answers, evaluate_answers(judge, questions, answers, verdicts))

    for entry in kept:
        said = evaluated(team.judge, harmful, entry["harmful"])
        mild = entry["benign"] and evaluated(
            team.benign_judge or team.judge, benign, entry["benign"]
        )
        second = entry["second"] and evaluated(team.second_judge, harmful, entry["second"])
        asked = {
            name: evaluated(measures[name].judge, measures[name].questions, content)
            for name, content in entry["utility"].items()
        }
        usefulness = {name: _or_nan(value) for name, value in entry["usefulness"].items()}
        for name, one in asked.items():
            usefulness |= measures[name].numbers(one.evaluation)
        found = Examination(
            harmful=said.evaluation,
            answers=said.answers,
            benign=mild.evaluation if mild else None,
            second=second.evaluation if second else None,
            benign_answers=mild.answers if mild else (),
        )
        point = entry["point"] | {"loss": _or_nan(entry["point"]["loss"])}
        record.add(AttackPoint(**point), found, usefulness, asked)
    return record


def _asked_to_json(asked: Asked) -> dict[str, Any]:
    return {
        "answers": [asdict(answer) for answer in asked.answers],
        "verdicts": [asdict(verdict) for verdict in asked.evaluation.verdicts],
    }


def _answers(content: Mapping[str, Any]) -> list[Answer]:
    return [Answer(**answer) for answer in content["answers"]]


def _verdicts(content: Mapping[str, Any]) -> list[Verdict]:
    return [Verdict(**verdict) for verdict in content["verdicts"]]


def _or_nan(value: float | None) -> float:
    # JSON has no NaN.
    return float("nan") if value is None else value

"""Readers turn a raw data row into a conversation; here the ones that fit any data set."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from patcher_pl.types import Conversation, Message, Role


class RowError(Exception):
    """A row that does not have the form its reader expects.

    Args:
        field: Path of the offending field inside the row, such as `messages[2].role`.
        problem: What is wrong with it.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field `{field}` {problem}")
        self.field = field
        self.problem = problem


class Reader(ABC):
    """Knows the columns of one data schema."""

    @abstractmethod
    def read(self, row: Mapping[str, Any], *, harmful: bool, origin: str) -> Conversation | None:
        """Returns the row as a conversation, or None where the reader does not want this row.

        Args:
            row: Column names and values.
            harmful: Whether answers of the source are harmful; counts only where the schema does
                not say so row by row.
            origin: Where the row came from.

        Raises:
            RowError: If a field is missing, empty or of the wrong type.
        """


def require_text(row: Mapping[str, Any], field: str) -> str:
    """Returns a text field without surrounding whitespace; refuses missing, empty, other types."""
    value = _require(row, field)
    if not isinstance(value, str):
        raise RowError(field, f"must be text, got {type(value).__name__} {value!r:.60}")
    if not value.strip():
        raise RowError(field, "is empty")
    return value.strip()


def optional_text(row: Mapping[str, Any], field: str) -> str:
    """Returns a text field without surrounding whitespace, or "" where it is missing or null."""
    return (
        ""
        if row.get(field) in (None, "") or not str(row[field]).strip()
        else require_text(row, field)
    )


def require_flag(row: Mapping[str, Any], field: str) -> bool:
    """Returns a true-or-false field; 0/1 and the words of CSV files are understood too."""
    value = _require(row, field)
    flags = {"true": True, "false": False, "1": True, "0": False}
    flag = flags.get(str(value).strip().lower())
    if flag is None:
        raise RowError(field, f"must be true or false, got {value!r:.60}")
    return flag


def question_and_answer(
    prompt: str, answer: str | None, *, harmful: bool, origin: str, system: str = ""
) -> Conversation:
    """Returns a single-turn conversation; without an answer, a prompt only."""
    turns = [Message("system", system)] if system else []
    turns.append(Message("user", prompt))
    if answer is not None:
        turns.append(Message("assistant", answer))
    return Conversation(tuple(turns), harmful, origin)


@dataclass(frozen=True, kw_only=True)
class PromptResponse(Reader):
    """Rows with the columns `prompt` and `response`."""

    def read(self, row: Mapping[str, Any], *, harmful: bool, origin: str) -> Conversation:
        return question_and_answer(
            require_text(row, "prompt"),
            require_text(row, "response"),
            harmful=harmful,
            origin=origin,
        )


@dataclass(frozen=True, kw_only=True)
class ColumnMap(Reader):
    """Rows of any schema with one question and at most one answer: names the columns.

    Args:
        prompt: Column of the question.
        response: Column of the answer; None for prompts without answers (evaluation only).
        system: Column of a system prompt; rows may leave it empty.
        harmful: Column that says whether the answer is harmful; None leaves it to the source.
        harmful_when: Value of that column that means harmful (false for columns like `is_safe`).
    """

    prompt: str
    response: str | None
    system: str | None = None
    harmful: str | None = None
    harmful_when: bool = True

    def read(self, row: Mapping[str, Any], *, harmful: bool, origin: str) -> Conversation:
        if self.harmful is not None:
            harmful = require_flag(row, self.harmful) == self.harmful_when
        return question_and_answer(
            require_text(row, self.prompt),
            None if self.response is None else require_text(row, self.response),
            harmful=harmful,
            origin=origin,
            system="" if self.system is None else optional_text(row, self.system),
        )


@dataclass(frozen=True, kw_only=True)
class Messages(Reader):
    """Rows with a list of turns: `[{"role": "user", "content": ...}, ...]`.

    After an optional system turn, user and assistant must take turns, the user first: most chat
    templates refuse anything else.

    Args:
        column: Column of the list.
    """

    column: str = "messages"

    def read(self, row: Mapping[str, Any], *, harmful: bool, origin: str) -> Conversation:
        value = _require(row, self.column)
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise RowError(self.column, f"must be a list of turns, got {value!r:.60}")
        turns = tuple(self._turn(item, index) for index, item in enumerate(value))
        self._check_order(turns)
        return Conversation(turns, harmful, origin)

    def _turn(self, item: Any, index: int) -> Message:
        place = f"{self.column}[{index}]"
        if not isinstance(item, Mapping):
            raise RowError(place, f"must have `role` and `content`, got {item!r:.60}")
        try:
            role, content = require_text(item, "role"), require_text(item, "content")
        except RowError as error:
            raise RowError(f"{place}.{error.field}", error.problem) from error
        if role not in get_args(Role):
            raise RowError(f"{place}.role", f"must be system, user or assistant, got {role!r}")
        return Message(cast(Role, role), content)

    def _check_order(self, turns: tuple[Message, ...]) -> None:
        first = 1 if turns and turns[0].role == "system" else 0
        if len(turns) == first:
            raise RowError(self.column, "holds no user turn")
        for index, turn in enumerate(turns[first:]):
            expected = ("user", "assistant")[index % 2]
            if turn.role != expected:
                place = f"{self.column}[{first + index}].role"
                raise RowError(place, f"must be {expected} at this place, got {turn.role}")


def _require(row: Mapping[str, Any], field: str) -> Any:
    if field not in row:
        columns = ", ".join(map(str, row)) or "none"
        raise RowError(field, f"is missing (the row has: {columns})")
    if row[field] is None:
        raise RowError(field, "is null")
    return row[field]

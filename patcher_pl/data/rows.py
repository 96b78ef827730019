"""Raw rows of local files and hub data sets, each with the place it came from."""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patcher_pl.errors import DataError, first_line

# Of an integer; more than any count or index needs, fewer than Python refuses to read.
_MOST_DIGITS = 1000
# Of lists and objects in each other; more than any schema has, fewer than Python can look through.
_MOST_LEVELS = 100
_TOO_DEEP = "nested too deeply"
_NOT_TEXT = "not UTF-8 text; save the file as UTF-8"
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class RawRow:
    """One row before a reader has seen it.

    Args:
        origin: File and line (JSON lines, CSV), or file or hub id and row number from 1.
        values: Columns of the row; None where the row itself could not be read.
        problem: Why it could not be read; empty where it could.
    """

    origin: str
    values: Mapping[str, Any] | None
    problem: str = ""


def read_file(path: Path, columns: Sequence[str] | None) -> Iterator[RawRow]:
    """Yields the rows of a local .jsonl, .json, .csv or .parquet file.

    Args:
        path: The file; its suffix tells the format. A .json file holds a list of objects or one
            object per line.
        columns: Column names of a CSV file without header row; None where it has one.

    Raises:
        DataError: If the file is missing, of another format, or cannot be read as a whole.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file. Check Source.path.")
    if columns is not None and path.suffix != ".csv":
        raise DataError(f"{path}: Source.columns is for CSV files; these rows name their columns.")
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path)
        elif path.suffix == ".csv":
            yield from _csv(path, columns)
        elif path.suffix == ".json" and _starts_list(path):
            yield from _json_list(path)
        else:
            yield from _json_lines(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}). Save the file as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error


def read_hub(
    path: str, *, name: str | None, split: str, revision: str | None, columns: Sequence[str] | None
) -> Iterator[RawRow]:
    """Yields the rows of a hub data set, or of a directory that `datasets` can load.

    Raises:
        DataError: If it cannot be loaded.
    """
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    options: dict[str, Any] = {} if columns is None else {"column_names": list(columns)}
    try:
        rows = datasets.load_dataset(path, name, split=split, revision=revision, **options)
    except (
        OSError,  # includes an unreachable hub and missing data sets
        ValueError,  # includes an unknown configuration or split
        TypeError,
        HfHubHTTPError,
        HFValidationError,
        DatasetsError,
    ) as error:
        raise DataError(
            f"Source.path: {path!r} (name {name!r}, split {split!r}, revision {revision!r}) could "
            f"not be loaded ({first_line(error)}). Give a hub id, or a local file that ends in "
            f"{', '.join(SUFFIXES)}."
        ) from error
    for number, values in enumerate(rows, start=1):
        yield RawRow(f"{path}[{split}] row {number}", values)  # type: ignore[arg-type]


def _json_lines(path: Path) -> Iterator[RawRow]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            origin = f"{path}:{number}"
            if not _is_text(line):
                yield RawRow(origin, None, _NOT_TEXT)
                continue
            decoder = _Decoder()
            try:
                start = len(line) - len(line.lstrip())
                values, end = decoder.raw_decode(line, start)
                if line[end:].strip():
                    raise json.JSONDecodeError("Extra data", line, end)
            except json.JSONDecodeError as error:
                yield RawRow(origin, None, f"not valid JSON ({error.msg} at column {error.colno})")
                continue
            except RecursionError:
                yield RawRow(origin, None, _TOO_DEEP)
                continue
            yield _object_row(origin, values, decoder.problem_of(values))


def _json_list(path: Path) -> Iterator[RawRow]:
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    place, number = text.index("[") + 1, 0
    line, counted = 1, 0
    while True:
        place = _behind_space(text, place)
        line, counted = line + text.count("\n", counted, place), place
        if number == 0 and text[place : place + 1] == "]":
            break
        number += 1
        decoder, problem = _Decoder(), ""
        try:
            try:
                values, end = decoder.raw_decode(text, place)
            except RecursionError:
                values, end, problem = None, _behind_brackets(text, place), _TOO_DEEP
            problem = problem if _is_text(text[place:end]) else _NOT_TEXT
            place = _behind_space(text, end)
            if text[place : place + 1] not in ("]", ","):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})."
            ) from error
        row = _object_row(f"{path} row {number}", values, problem or decoder.problem_of(values))
        yield replace(row, problem=f"{row.problem} (line {line})") if row.problem else row
        if text[place] == "]":
            break
        place += 1
    if text[_behind_space(text, place + 1) :]:
        raise DataError(f"{path}: text follows behind the list. Remove it.")


def _behind_brackets(text: str, place: int) -> int:
    """Where a value ends that is too deep to be read; the end of the text if nowhere."""
    depth = 0
    for found in _BRACKETS.finditer(text, place):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.end()
    return len(text)


def _behind_space(text: str, place: int) -> int:
    while text[place : place + 1].isspace():
        place += 1
    return place


class _Decoder(json.JSONDecoder):
    """Reads JSON that is valid but means nothing certain, and says so afterwards."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object, parse_int=self._int)
        self._problem = ""

    def problem_of(self, values: Any) -> str:
        """What is wrong with what was read; empty where nothing is."""
        if not self._problem and _is_deep(values):
            self._problem = _TOO_DEEP
        if not self._problem and not _is_text(json.dumps(values, ensure_ascii=False)):
            self._problem = "holds half of a surrogate pair, which no text can"
        return self._problem

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self._problem = f"gives the key {twice!r} twice"
        return values

    def _int(self, digits: str) -> int:
        if len(digits) > _MOST_DIGITS:
            self._problem = f"holds an integer of {len(digits)} digits"
            return 0
        return int(digits)


def _is_deep(values: Any) -> bool:
    level = [values] if isinstance(values, dict | list) else []
    for _ in range(_MOST_LEVELS):
        inner = [entry.values() if isinstance(entry, dict) else entry for entry in level]
        level = [entry for entries in inner for entry in entries if isinstance(entry, dict | list)]
        if not level:
            return False
    return True


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _object_row(origin: str, values: Any, problem: str) -> RawRow:
    if not problem and not isinstance(values, dict):
        problem = f"must be a JSON object, got {type(values).__name__} {values!r:.40}"
    return RawRow(origin, None, problem) if problem else RawRow(origin, values)


def _csv(path: Path, columns: Sequence[str] | None) -> Iterator[RawRow]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = csv.reader(file, strict=True)
        header = list(columns) if columns is not None else next(lines, [])
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise DataError(f"{path}:1: the header has the column {twice[0]!r} twice. Rename one.")
        while True:
            # A quoted cell may span lines: the row starts on the line after the last one read.
            origin = f"{path}:{lines.line_num + 1}"
            try:
                cells = next(lines, None)
            except csv.Error as error:
                # The parser cannot tell where the next row begins.
                raise DataError(f"{origin}: not valid CSV ({error}).") from error
            if cells is None:
                return
            if not cells:
                continue
            if columns is not None and lines.line_num == 1 and _folded(cells) == _folded(header):
                raise DataError(
                    f"{path}:1: the file has the header that Source.columns names. Remove `columns`."
                )
            if not all(map(_is_text, cells)):
                yield RawRow(origin, None, _NOT_TEXT)
            elif len(cells) != len(header):
                problem = f"has {len(cells)} cells, the header has {len(header)} columns"
                yield RawRow(origin, None, problem)
            else:
                yield RawRow(origin, dict(zip(header, cells, strict=True)))


def _folded(names: Sequence[str]) -> list[str]:
    return sorted(name.strip().casefold() for name in names)


def _parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number, names = 0, file.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise DataError(f"{path}: has the column {twice[0]!r} twice. Rename one.")
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{path} row {number}", values)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a valid Parquet file ({first_line(error)}).") from error


def _starts_list(path: Path) -> bool:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for line in file:
            if line.strip():
                return line.lstrip().startswith("[")
    return False

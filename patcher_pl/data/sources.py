"""Where conversations come from: one file or hub data set, and how its rows are read."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from patcher_pl.data.readers import PromptResponse, Reader, RowError
from patcher_pl.data.rows import SUFFIXES, RawRow, read_file, read_hub
from patcher_pl.errors import DataError
from patcher_pl.types import Conversation
from patcher_pl.validation import require
from patcher_pl.world_files import contents_of, resolve_data

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set: a local file, a hub id, `testbed/<file>`, or `facts:<model>/<file>`.

    Args:
        path: Local .jsonl, .json, .csv or .parquet file, hub id, directory that `datasets` can
            load, `testbed/<file>` of the built-in testbed, or `facts:<model>/<file>`: what a model
            knows (docs/worlds.md), found out when it is first read and kept in the user's cache;
            the YAML file of another such world in the place of `facts`.
        reader: Knows the columns.
        name: Configuration of a hub data set (`main` of openai/gsm8k).
        split: Split of a hub data set; local files have none.
        revision: Branch, tag or commit of a hub data set.
        harmful: Whether the answers are harmful; counts where the reader's schema does not say.
        weight: Share of this source in a mixture, relative to the others (> 0).
        limit: Take the first so many usable rows (>= 1); None takes all.
        columns: Column names of CSV files without header row; None where they have one.
        skip_bad_rows: Skip malformed rows, counted and logged, instead of stopping at the first.

    Raises:
        ValueError: If a value is out of its range.
    """

    path: str
    reader: Reader = field(default_factory=PromptResponse)
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    harmful: bool = False
    weight: float = 1.0
    limit: int | None = None
    columns: list[str] | None = None
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("Source.path must not be empty. Give a file or a hub id.")
        require(self, self.weight > 0, "weight", "> 0", "Remove the source to leave it out.")
        remedy = "Use null to take all rows."
        require(self, self.limit is None or self.limit >= 1, "limit", ">= 1", remedy)
        if self.columns is not None and len(set(self.columns)) < len(self.columns):
            raise ValueError(
                f"Source.columns must name every column once, got {self.columns}. Rename one."
            )

    def load(self) -> list[Conversation]:
        """Returns the usable rows in the order of the source; logs how many malformed ones it skips.

        Raises:
            DataError: If the source cannot be read, a row is malformed (names file, line and
                field), or no usable row is left.
        """
        conversations: list[Conversation] = []
        num_unwanted = 0
        problems: list[str] = []
        for row in self._raw_rows():
            if self.limit is not None and len(conversations) == self.limit:
                break
            try:
                conversation = self._conversation(row)
            except RowError as error:
                problems.append(f"{row.origin}: {error}")
            else:
                if row.values is None:
                    problems.append(f"{row.origin}: {row.problem}")
                elif conversation is None:
                    num_unwanted += 1
                else:
                    conversations.append(conversation)
            if problems and not self.skip_bad_rows:
                raise DataError(
                    f"{problems[0]}. Repair the row, check Source.reader "
                    f"({type(self.reader).__name__}), or set Source.skip_bad_rows: true."
                )
        if problems:
            _log.warning(
                "%s: skipped %d malformed rows, first %s", self.path, len(problems), problems[0]
            )
        if not conversations:
            raise DataError(
                f"{self.path}: no usable row ({len(problems)} malformed, {num_unwanted} left out "
                f"by {self.reader})."
            )
        return conversations

    def contents(self) -> Mapping[str, str]:
        """See `NamesContents`: what the data set holds, wherever it lies."""
        digest = contents_of(self.path, self.revision)
        return {} if digest is None else {"path": digest}

    def _conversation(self, row: RawRow) -> Conversation | None:
        if row.values is None:
            return None
        return self.reader.read(row.values, harmful=self.harmful, origin=row.origin)

    def _raw_rows(self) -> Iterator[RawRow]:
        location = resolve_data(self.path)
        path = Path(location).expanduser()
        if path.is_file() and path.suffix not in SUFFIXES:
            raise DataError(
                f"{location}: Source.path must end in {', '.join(SUFFIXES)}, got {path.suffix!r}."
            )
        if path.suffix in SUFFIXES:
            return read_file(path, self.columns)
        return read_hub(
            location,
            name=self.name,
            split=self.split,
            revision=self.revision,
            columns=self.columns,
        )

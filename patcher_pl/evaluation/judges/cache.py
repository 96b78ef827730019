"""Verdicts that were paid for once, kept on disk."""

import hashlib
import json
import logging
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patcher_pl.errors import ConfigError
from patcher_pl.evaluation.judges.base import Verdict

_BUSY_S = 60.0

logger = logging.getLogger(__name__)


class VerdictCache:
    """An SQLite file of verdicts by digest of what was asked; several processes may share it.

    It holds digests, scores and flags, no text and no keys. Every verdict is on disk when `put`
    returns, so an interrupted run loses none. Used by one thread at a time.

    Args:
        path: The file; it and its folders are created when missing.

    Raises:
        ConfigError: If the file cannot be opened or is no such cache.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.expanduser()
        self._writable = True
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error
        try:
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS verdicts "
                "(digest TEXT PRIMARY KEY, score INTEGER NOT NULL, coherent INTEGER NOT NULL)"
            )
            self._connection.execute("SELECT digest, score, coherent FROM verdicts LIMIT 1")
        except sqlite3.Error as error:
            self._connection.close()
            raise self._unusable(error) from error

    def __enter__(self) -> "VerdictCache":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def get(self, digest: str) -> Verdict | None:
        """The verdict with that digest; None where there is none.

        Raises:
            ConfigError: If the file cannot be read.
        """
        try:
            row = self._connection.execute(
                "SELECT score, coherent FROM verdicts WHERE digest = ?", (digest,)
            ).fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        return None if row is None else Verdict(row[0], coherent=bool(row[1]))

    def put(self, digest: str, verdict: Verdict) -> None:
        """Keeps a verdict; failures of the judge are never kept.

        A file that cannot be written (a full disk, say) is told once and then left alone: the
        verdicts themselves are good.
        """
        if verdict.score is None or not self._writable:
            return
        try:
            self._connection.execute(
                "INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?)",
                (digest, verdict.score, int(verdict.coherent)),
            )
        except sqlite3.Error as error:
            self._writable = False
            logger.warning("%s: verdicts are not cached any more (%s)", self._path, error)

    def _unusable(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"cache: {self._path} cannot be used ({error}). Give the path of an SQLite file that "
            "this judge wrote, of a new file, or null."
        )


def digest(endpoint: str, request: Mapping[str, Any]) -> str:
    """Tells requests apart: by the server and by everything in the request's body."""
    text = json.dumps([endpoint, request], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

"""The idea of a job: work whose outcome is one file, whole or absent, that says what it depends on."""

import json
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from patcher_pl.errors import PatcherError
from patcher_pl.files import write_json

logger = logging.getLogger(__name__)

# What every job that loads a model imports, see `Job.modules`.
FOR_MODELS = (
    "transformers.generation",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
)


class Outcome(Protocol):
    """What a job found, or why it found nothing."""

    @property
    def error(self) -> str | None: ...


Found = TypeVar("Found", bound=Outcome)


@dataclass(frozen=True, kw_only=True)
class Job(ABC, Generic[Found]):
    """Work that runs, fails and is resumed by itself; engines run it, in any process.

    Args:
        path: File of the outcome; whole or absent.
        digest: Of everything that the outcome depends on; a file with another one does not count.
    """

    path: Path
    digest: str

    key: ClassVar[str]
    """Of the outcome in the file."""
    wants_own_process: ClassVar[bool] = False
    """Whether it measures its process, which must not have done anything else."""
    is_shareable: ClassVar[bool] = False
    """Whether several processes can do it, see `perform_together`."""
    if_killed: ClassVar[str] = ""
    """What helps where the system killed its process."""

    @abstractmethod
    def perform(self, device: str) -> None:
        """Does the work and leaves the outcome.

        Args:
            device: `cpu`, `cuda:1`, `auto`, ...

        Raises:
            PatcherError: For what all other jobs would meet too: it ends the whole run. Any other
                exception is this job's failure alone.
        """

    def perform_together(self, device: str) -> None:
        """Does the work as one of the processes that a launcher has started for it.

        All of them call it. The first alone decides how it is done and leaves the outcome; one that
        failed, and that the others would wait for, leaves why and ends with a status that is not 0.

        Raises:
            PatcherError: See `perform`.
            SystemExit: If this process failed.
        """
        raise NotImplementedError(f"{type(self).__name__} is not shareable")

    @abstractmethod
    def fail(self, reason: str) -> None:
        """Leaves why there is no outcome; the next run tries again."""

    @abstractmethod
    def parse(self, content: Any) -> Found:
        """Builds the outcome from what `write` was given."""

    def modules(self) -> list[str]:
        """What takes long to import; a process that has done so is forked for every job."""
        return []

    def attempt(self, device: str) -> None:
        """`perform`, as engines call it: a failure of this job's own is written down.

        Raises:
            PatcherError: See `perform`.
        """
        try:
            self.perform(device)
        except PatcherError:
            raise
        except Exception as error:
            logger.warning("%s failed", self.path, exc_info=error)
            self.fail(f"{type(error).__name__}: {error}")

    def write(self, content: Any, **beside: Any) -> None:
        """Writes the outcome, as plain JSON values, and what else shall be in the file."""
        write_json(self.path, {"fingerprint": self.digest, self.key: content, **beside})

    def read(self) -> dict[str, Any] | None:
        """The content of the file; None where there is none with this digest.

        Raises:
            ValueError, KeyError, TypeError: If the file is broken.
        """
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return content if content["fingerprint"] == self.digest else None

    def load(self) -> Found | None:
        """The outcome, failures included; None where there is none with this digest.

        Raises:
            PatcherError: If the file is broken.
        """
        try:
            content = self.read()
            return None if content is None else self.parse(content[self.key])
        except (ValueError, KeyError, TypeError) as error:
            raise PatcherError(
                f"{self.path}: this is no outcome of a job ({error}). Delete it and go on with the "
                "same command."
            ) from error

    @property
    def changed_at(self) -> int | None:
        """When the file was last written (ns since 1970); None where there is none."""
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    @property
    def is_done(self) -> bool:
        """Whether it ran to its end; what failed is tried again."""
        outcome = self.load()
        return outcome is not None and outcome.error is None

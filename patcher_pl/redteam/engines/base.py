"""The interface of an engine."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from patcher_pl.redteam.assignment import Assignment


class Engine(ABC):
    """Runs assignments, with a progress bar that shows the remaining time."""

    @abstractmethod
    def run(self, assignments: Sequence[Assignment], device: str) -> None:
        """Runs every assignment once; each leaves its file.

        An attack that fails, or whose process dies, leaves a file with its error, and the others
        go on.

        Args:
            assignments: What is not done yet.
            device: Where to run, unless the engine has devices of its own.

        Raises:
            DataError: If prompts or data cannot be used.
            ConfigError: If a model, a device or the engine cannot be used.
            RunInterrupted: If a signal stopped it; finished assignments are kept.
        """

"""Errors that a user can act on; the command line prints their text without a stack trace."""


class PatcherError(Exception):
    """Base of every error whose message alone tells the user what to do."""


class ConfigError(PatcherError):
    """A configuration that cannot be run: names the key, the value and the remedy."""


class DataError(PatcherError):
    """A data source, file or row that cannot be used: names file, line and field."""


class CheckpointError(PatcherError):
    """A checkpoint that is missing, torn or does not fit: names the file and the remedy."""


class RunInterrupted(PatcherError):  # noqa: N818
    """The run stopped on a signal after everything computed so far was saved.

    Args:
        message: What was saved and how to go on.
        signal: Number of the signal.
    """

    def __init__(self, message: str, signal: int = 2) -> None:
        super().__init__(message)
        self.signal = signal


def first_line(error: BaseException) -> str:
    """What an error says, short enough to be quoted; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

"""The command line; importing it costs nothing until a command is chosen."""

from patcher_pl.cli.main import main, run

__all__ = ["main", "run"]

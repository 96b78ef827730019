"""What a first run on somebody's own model and data needs: files that run as they stand."""

from patcher_pl.starter.folder import Starter, write_starter
from patcher_pl.starter.model import ModelFacts, lengths
from patcher_pl.starter.split import Split, read_rows, split_rows

__all__ = ["ModelFacts", "Split", "Starter", "lengths", "read_rows", "split_rows", "write_starter"]

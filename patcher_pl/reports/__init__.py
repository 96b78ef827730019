"""Result files, and the tables and figures drawn from them; imports neither torch nor lightning."""

from patcher_pl.reports.curves import asr_figure
from patcher_pl.reports.drawing import save_figure
from patcher_pl.reports.environment import environment
from patcher_pl.reports.results import Curve, Overlap, Results, Sample
from patcher_pl.reports.tables import to_csv, to_markdown, to_rich

__all__ = [
    "Curve",
    "Overlap",
    "Results",
    "Sample",
    "asr_figure",
    "environment",
    "save_figure",
    "to_csv",
    "to_markdown",
    "to_rich",
]

"""Whether a release meets criteria that were fixed beforehand."""

from patcher_pl.reports.decision.criteria import Criteria, Criterion, Earlier, load_criteria
from patcher_pl.reports.decision.judging import Finding, judge
from patcher_pl.reports.decision.page import decision_markdown, decision_page

__all__ = [
    "Criteria",
    "Criterion",
    "Earlier",
    "Finding",
    "decision_markdown",
    "decision_page",
    "judge",
    "load_criteria",
]

"""What the figures of a report rest on: means, intervals, areas, cost to break, paired tests."""

from patcher_pl.reports.statistics.estimates import (
    BreakCost,
    Estimate,
    area_under_asr,
    asr_area,
    asr_at,
    cost_to_break,
    final_asr,
    worst_asr,
)
from patcher_pl.reports.statistics.pairs import (
    NotComparable,
    PairedComparison,
    compare,
    compare_all,
    holm,
)

__all__ = [
    "BreakCost",
    "Estimate",
    "NotComparable",
    "PairedComparison",
    "area_under_asr",
    "asr_area",
    "asr_at",
    "compare",
    "compare_all",
    "cost_to_break",
    "final_asr",
    "holm",
    "worst_asr",
]

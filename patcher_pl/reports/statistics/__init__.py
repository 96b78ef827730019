"""What the figures of a report rest on: means, intervals, areas, cost to break, paired tests."""

from patcher_pl.reports.statistics.area import Scale, area_under_asr
from patcher_pl.reports.statistics.breaking import BreakCost, cost_to_break
from patcher_pl.reports.statistics.estimates import (
    Estimate,
    asr_area,
    asr_at,
    final_asr,
    worst_asr,
)
from patcher_pl.reports.statistics.pairs import (
    PairedComparison,
    Refusal,
    compare,
    compare_all,
    holm,
)

__all__ = [
    "BreakCost",
    "Estimate",
    "PairedComparison",
    "Refusal",
    "Scale",
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

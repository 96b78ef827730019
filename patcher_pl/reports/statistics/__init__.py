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
from patcher_pl.reports.statistics.scaling import (
    GEOMETRIC_MEAN,
    WORST_CASE,
    Level,
    Reach,
    Slope,
    StepsToBreak,
    first_break,
    levels,
    reaches,
    slopes,
)

__all__ = [
    "GEOMETRIC_MEAN",
    "WORST_CASE",
    "BreakCost",
    "Estimate",
    "Level",
    "NotComparable",
    "PairedComparison",
    "Reach",
    "Slope",
    "StepsToBreak",
    "area_under_asr",
    "asr_area",
    "asr_at",
    "compare",
    "compare_all",
    "cost_to_break",
    "final_asr",
    "first_break",
    "holm",
    "levels",
    "reaches",
    "slopes",
    "worst_asr",
]

"""The table of what breaking each defense costs in time and money."""

from collections.abc import Sequence
from typing import Any

from patcher_pl.reports.formats import MISSING
from patcher_pl.reports.grouping import Frame
from patcher_pl.reports.page_tables import Captioned
from patcher_pl.reports.prices import Prices, Tier
from patcher_pl.reports.statistics import BreakCost
from patcher_pl.reports.tables import rows_of, text_table


def price_table(frame: Frame, prices: Prices) -> Captioned | None:
    """What breaking each defense costs on every tier; None where no FLOPs were counted."""
    rows = [
        [row.attack, row.label, *(cell for tier in prices.tiers for cell in _cells(row, tier))]
        for row in rows_of(frame)
    ]
    if all(cell == MISSING for row in rows for cell in row[2:]):
        return None
    header = ["attack", "defense"]
    for tier in prices.tiers:
        header += [f"{tier.name}: hours", f"{tier.name}: {prices.currency}"]
    assumed = "; ".join(
        f"{tier.name}: {tier.num_devices} x {tier.peak_tflops:g} TFLOP/s at {tier.utilization:.0%}, "
        f"{tier.price_per_hour:g} {prices.currency} per device and hour"
        for tier in prices.tiers
    )
    return Captioned(
        "Cost to break in time and money: the median FLOPs of the attack at the speed of each tier "
        f"({assumed}). The training of one attack alone: finding it, its data, and attempts that failed "
        'are not counted. ">": beyond the longest attack that was measured.',
        text_table(header, rows),
    )


def _cells(row: Any, tier: Tier) -> Sequence[str]:
    cost: BreakCost | None = row.flops_to_break
    if cost is None:
        return [MISSING, MISSING]
    flops = cost.horizon if cost.median is None else cost.median
    sign = "> " if cost.median is None else ""
    return [f"{sign}{_short(tier.hours(flops))}", f"{sign}{_short(tier.price(flops))}"]


def _short(value: float) -> str:
    """Two digits, without an exponent where a reader can do without."""
    if value == 0 or 0.001 <= value < 1e6:
        return f"{value:.2g}" if value < 100 else f"{value:.0f}"
    return f"{value:.1e}"

"""What an attack costs whoever runs it: device hours and money, by the hardware that they have."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from patcher_pl.reports.formats import MISSING
from patcher_pl.reports.grouping import Frame
from patcher_pl.reports.page_tables import Captioned
from patcher_pl.reports.statistics import BreakCost
from patcher_pl.reports.tables import rows_of, text_table
from patcher_pl.validation import require


@dataclass(frozen=True, kw_only=True)
class Tier:
    """Hardware of an attacker.

    Args:
        name: What it is called, such as `one RTX 4090`.
        num_devices: Devices that work together (count, >= 1).
        peak_tflops: Of each, in the number format of the attack (10^12 operations per second, > 0).
        utilization: Share of the peak that training reaches (in (0, 1]).
        price_per_hour: Of one device for an hour (in the currency of `Prices`, >= 0).

    Raises:
        ValueError: If a value is out of its range.
    """

    name: str
    peak_tflops: float
    price_per_hour: float
    num_devices: int = 1
    utilization: float = 0.4

    def __post_init__(self) -> None:
        require(self, self.num_devices >= 1, "num_devices", ">= 1")
        require(self, self.peak_tflops > 0, "peak_tflops", "> 0", "A data sheet has it.")
        require(self, 0 < self.utilization <= 1, "utilization", "in (0, 1]", "0.4 is common.")
        require(self, self.price_per_hour >= 0, "price_per_hour", ">= 0")

    def device_hours(self, flops: float) -> float:
        """Hours of one device, summed over all of them."""
        return flops / (self.peak_tflops * 1e12 * self.utilization) / 3600

    def hours(self, flops: float) -> float:
        """Hours on the clock."""
        return self.device_hours(flops) / self.num_devices

    def price(self, flops: float) -> float:
        """What these hours cost."""
        return self.device_hours(flops) * self.price_per_hour


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What hardware costs; prices change, so that they are the reader's to give.

    Args:
        tiers: Hardware, from the attacker with least of it to the one with most.
        currency: Of the prices.

    Raises:
        ValueError: If there is no tier, or two have the same name.
    """

    tiers: list[Tier]
    currency: str = "USD"

    def __post_init__(self) -> None:
        names = [tier.name for tier in self.tiers]
        distinct = bool(names) and len(set(names)) == len(names)
        require(self, distinct, "tiers", "at least one, with names of their own")


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

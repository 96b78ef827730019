"""What an attack costs whoever runs it: device hours and money, by the hardware that they have."""

from dataclasses import dataclass

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

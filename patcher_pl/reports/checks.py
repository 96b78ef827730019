"""Whether the lists of a curve belong together."""

import math
from collections.abc import Mapping
from typing import Any, get_origin


def measured_lists(kinds: Mapping[str, Any]) -> list[str]:
    """Fields of a curve with an entry per measurement.

    Args:
        kinds: Types of all its fields.
    """
    others = ("samples", "skipped_steps", "remarks")
    return [name for name, kind in kinds.items() if get_origin(kind) is list and name not in others]


def check_lists(entries: dict[str, Any], kinds: Mapping[str, Any]) -> None:
    """Holds every list against `attack_steps`, and turns NaN among rates into None.

    Args:
        entries: Fields of a curve, by name; changed in place.
        kinds: Types of all its fields.

    Raises:
        ValueError: If the lists do not belong together, or a rate is not one.
    """
    steps = entries["attack_steps"]
    if list(steps) != sorted(steps):
        raise ValueError(f"attack_steps must ascend, got {steps}")
    skipped = list(entries.get("skipped_steps", []))
    if skipped != sorted(skipped) or (steps and skipped and skipped[0] <= steps[-1]):
        raise ValueError(f"skipped_steps must ascend from {steps[-1:]}, got {skipped}")
    lists = {name: entries[name] for name in measured_lists(kinds) if name in entries}
    del lists["attack_steps"]
    lists |= {f"utility.{name}": values for name, values in entries.get("utility", {}).items()}
    for name, values in lists.items():
        if len(values) != len(steps) and (values or name == "asr"):
            raise ValueError(f"{name} has {len(values)} entries, attack_steps {len(steps)}")
    for name in entries:
        # Kappa is below 0 where judges agree less than by chance.
        if kinds[name] == list[float | None] and name != "judge_agreement":
            rates = entries[name]
            entries[name] = [
                None if rate is None or not math.isfinite(rate) else rate for rate in rates
            ]
            for rate in entries[name]:
                if rate is not None and not 0 <= rate <= 1:
                    raise ValueError(f"{name} must be in 0..1, got {rate}")
    lengths = {len(row) for row in entries.get("scores", [])}
    if len(lengths) > 1:
        raise ValueError(
            f"scores must have as many prompts at every measurement, got {sorted(lengths)}"
        )

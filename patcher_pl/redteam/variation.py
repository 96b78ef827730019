"""The settings of an attack that a grid or a search varies."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from patcher_pl.data.mixing import Mixture
from patcher_pl.redteam.base import Attack

Setting = float | int | str

# Settings of the attacker's data; all others are the attack's own.
DATA_SETTINGS = ("poison_ratio", "num_examples")


@dataclass(frozen=True, kw_only=True)
class Varied:
    """One list for every setting that can be varied; an empty one leaves the setting alone.

    What the lists hold, values or ends of ranges, is for subclasses to say.
    """

    lr: list[float] = field(default_factory=list)
    num_steps: list[int] = field(default_factory=list)
    batch_size: list[int] = field(default_factory=list)
    schedule: list[str] = field(default_factory=list)
    num_warmup_steps: list[int] = field(default_factory=list)
    template: list[str] = field(default_factory=list)
    poison_ratio: list[float] = field(default_factory=list)
    num_examples: list[int] = field(default_factory=list)

    def lists_of(self, attack: Attack) -> dict[str, list[Setting]]:
        """The lists that are not empty and whose setting the attack has."""
        lists = {one.name: getattr(self, one.name) for one in fields(Varied)}
        return {
            name: values for name, values in lists.items() if values and has_setting(attack, name)
        }


def has_setting(attack: Attack, name: str) -> bool:
    """Whether varying `name` (a field of `Varied`) changes what this attack does."""
    own = {one.name for one in fields(attack)}
    if name in DATA_SETTINGS:
        return attack.uses_data
    if name == "lr":
        return "optimizer" in own
    if name == "num_steps":
        return "attack_steps" in own
    return name == "template" or name in own


def setting_of(attack: Attack, data: Mixture, name: str) -> Setting | None:
    """The value that an attack, or the red team's data, has; None where it has none."""
    if name in DATA_SETTINGS:
        return getattr(data, name)
    if not has_setting(attack, name):
        return None
    own: Any = attack
    if name == "lr":
        return own.optimizer.lr
    if name == "num_steps":
        return own.attack_steps[-1]
    return own.asking.template if name == "template" else getattr(own, name)


def varied_attack(attack: Attack, settings: Mapping[str, Setting]) -> Attack:
    """The attack with some of its settings replaced; those of the data are passed over.

    `num_steps` ends the attack there and keeps the measurements before it. The label goes: whoever
    varies an attack names it.

    Raises:
        ValueError: If a value is out of its range.
    """
    changed: Any = attack
    for name, value in settings.items():
        if name in DATA_SETTINGS:
            continue
        if name == "lr":
            changed = replace(changed, optimizer=replace(changed.optimizer, lr=value))
        elif name == "num_steps":
            kept = [steps for steps in changed.attack_steps if steps < value]
            changed = replace(changed, attack_steps=[*kept, value])
        elif name == "template":
            changed = replace(changed, asking=replace(changed.asking, template=value))
        else:
            changed = replace(changed, **{name: value})
    return changed


def varied_data(data: Mixture, settings: Mapping[str, Setting]) -> Mixture:
    """The data with its share or number of rows replaced; the attack's settings are passed over.

    Raises:
        ValueError: If a value is out of its range.
    """
    own: dict[str, Any] = {name: settings[name] for name in DATA_SETTINGS if name in settings}
    return replace(data, **own) if own else data


def varied_name(name: str, settings: Mapping[str, Setting]) -> str:
    """Name of a varied attack, such as `full_adamw lr=0.0003 poison_ratio=1`."""
    return " ".join([name, *(f"{key}={_shown(value)}" for key, value in settings.items())])


def _shown(value: Setting) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

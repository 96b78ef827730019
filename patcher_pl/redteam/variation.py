"""The settings of an attack that a grid or a search varies: dotted fields of it and of its data."""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from patcher_pl.data.mixing import Mixture
from patcher_pl.fields import has_field, names_of, with_field
from patcher_pl.redteam.base import Attack

Setting = float | int | str

# Short names of settings that many attacks have.
_FIELDS = {
    "lr": "optimizer.lr",
    "template": "asking.template",
    "poison_ratio": "data.poison_ratio",
    "num_examples": "data.num_examples",
}
# No field: ends the attack there, its schedule included, and keeps the measurements before it.
NUM_STEPS = "num_steps"


def field_of(name: str) -> str:
    """The field that a setting's name stands for, such as `optimizer.lr` for `lr`."""
    return _FIELDS.get(name, name)


def has_setting(attack: Attack, name: str) -> bool:
    """Whether varying `name` changes what this attack does."""
    path = field_of(name)
    if path.startswith("data."):
        return attack.uses_data and path.removeprefix("data.") in names_of(Mixture)
    if name == NUM_STEPS:
        return "attack_steps" in names_of(attack)
    return has_field(attack, path)


def require_settings(
    owner: str, varied: Mapping[str, Sequence[Any]], attacks: Sequence[Attack]
) -> None:
    """Sees to it that everything that is varied is a setting of some attack.

    Args:
        owner: Where the names stand, for the message.
        varied: Settings, and what is tried for them.
        attacks: Those that may have them.

    Raises:
        ValueError: If no attack has one of them.
    """
    for name, values in varied.items():
        if values and not any(has_setting(attack, name) for attack in attacks):
            raise ValueError(
                f"{owner} must name settings of its attacks, got {name!r}, which none of "
                f"{', '.join(attack.name for attack in attacks)} has. Give a field, such as "
                f"`optimizer.lr` or `data.poison_ratio`, `{NUM_STEPS}`, or one of "
                f"{', '.join(f'`{short}`' for short in _FIELDS)}."
            )


def setting_of(attack: Attack, data: Mixture, name: str) -> Setting | None:
    """The value that an attack, or the red team's data, has; None where it has none."""
    if not has_setting(attack, name):
        return None
    if name == NUM_STEPS:
        return attrgetter("attack_steps")(attack)[-1]
    path = field_of(name)
    own = path.removeprefix("data.")
    return attrgetter(own)(attack if own == path else data)


def varied_attack(attack: Attack, settings: Mapping[str, Setting]) -> Attack:
    """The attack with some of its settings replaced; those of the data are passed over.

    Raises:
        ValueError: If a value is out of its range, or of another type.
    """
    changed: Any = attack
    for name, value in settings.items():
        path = field_of(name)
        if name == NUM_STEPS:
            kept = [steps for steps in changed.attack_steps if steps < value]
            changed = with_field(changed, "attack_steps", [*kept, value])
        elif not path.startswith("data."):
            changed = with_field(changed, path, value)
    return changed


def varied_data(data: Mixture, settings: Mapping[str, Setting]) -> Mixture:
    """The data with its share or number of rows replaced; the attack's settings are passed over.

    Raises:
        ValueError: If a value is out of its range, or of another type.
    """
    for name, value in settings.items():
        path = field_of(name)
        if path.startswith("data."):
            data = with_field(data, path.removeprefix("data."), value)
    return data


def varied_name(name: str, settings: Mapping[str, Setting]) -> str:
    """Name of a varied attack, such as `full_adamw lr=0.0003 poison_ratio=1`."""
    return " ".join([name, *(f"{key}={_shown(value)}" for key, value in settings.items())])


def _shown(value: Setting) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

"""Which settings of a run differ from those that its checkpoint was written with, and what each means."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patcher_pl.jobs.inputs import content_of
from patcher_pl.reports.environment import hide_secrets

OPTIMIZER = "model.init_args.optimizer"
SCHEDULER = "model.init_args.scheduler"
_SCHEDULED = "the schedule goes on from the settings that it began with"
_POSITION = "the position in the data means nothing in other data"
# The first that a setting belongs to counts; whatever belongs to none is taken.
_REFUSED = {
    "model.class_path": "the checkpoint is one of that defense",
    "model.init_args.language_model.path": "the weights come from that model",
    "model.init_args.language_model.lora": "the checkpoint holds other adapters",
    "model.init_args.language_model.chat": "the data would be other tokens",
    f"{OPTIMIZER}.class_path": "its state is of no use to another optimizer",
    SCHEDULER: _SCHEDULED,
    "data.safe": _POSITION,
    "data.attack": _POSITION,
    "data.seed": _POSITION,
    "seed_everything": _POSITION,
}
# How and where a run goes on is no part of what it does.
_NO_SETTINGS = ("config", "ckpt_path", "overwrite", "run_dir")
_ABSENT = "(none)"
_SEVERAL = "(several settings)"


@dataclass(frozen=True)
class Change:
    """A setting that differs.

    Args:
        name: Its dotted name.
        before: Its value when the checkpoint was written.
        now: Its value in the run that goes on.
        refused: Why it cannot change on the way; None where it is taken from here on.
    """

    name: str
    before: Any
    now: Any
    refused: str | None

    def __str__(self) -> str:
        # Both as text: contents of a name may differ.
        before, now = (_shown(self.name, value) for value in (self.before, self.now))
        if before == now:
            now += ", with other content"
        return f"{self.name}: {before} -> {now}"


def flat_settings(config: Mapping[str, Any], *, with_contents: bool) -> dict[str, Any]:
    """The settings of a complete configuration by dotted name.

    Args:
        config: As plain values.
        with_contents: Add a digest of what they hold to names of files, models and data sets.
    """
    kept = {name: value for name, value in config.items() if name not in _NO_SETTINGS}
    settings: dict[str, Any] = {}
    for name, value in _leaves(kept, ""):
        settings[name] = value
        if with_contents and isinstance(value, str) and (digest := content_of(value, Path(), name)):
            settings[name] = {"name": value, "digest": digest}
    return settings


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Every difference between two results of `flat_settings`, refused ones first."""
    is_scheduled = before.get(SCHEDULER, _ABSENT) is not None
    found, whole = [], ""
    for name in sorted(before.keys() | now.keys(), key=lambda name: name.split(".")):
        old, new = before.get(name, _ABSENT), now.get(name, _ABSENT)
        if _content(old) != _content(new) and not (whole and name.startswith(f"{whole}.")):
            if (name in before) != (name in now):
                # One value on one side, many below it on the other: told at once.
                old, new = _as_whole(name, before), _as_whole(name, now)
                whole = name
            refused = None if _is_new(name, before) else _refusal(name, is_scheduled=is_scheduled)
            found.append(Change(name, old, new, refused))
    return sorted(found, key=lambda change: change.refused is None)


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        entries = value.items()
    elif isinstance(value, list | tuple) and value:
        entries = enumerate(value)
    else:
        yield name, value
        return
    for key, entry in entries:
        yield from _leaves(entry, f"{name}.{key}" if name else str(key))


def _as_whole(name: str, settings: Mapping[str, Any]) -> Any:
    is_owner = any(known.startswith(f"{name}.") for known in settings)
    return _SEVERAL if is_owner else settings.get(name, _ABSENT)


def _is_new(name: str, before: Mapping[str, Any]) -> bool:
    """Whether it is a setting that its owner did not have, in an earlier version for instance."""
    owner = name.rpartition(".")[0]
    return name not in before and any(known.startswith(f"{owner}.") for known in before)


def _refusal(name: str, *, is_scheduled: bool) -> str | None:
    for owner, reason in _REFUSED.items():
        if name == owner or name.startswith(f"{owner}."):
            return reason
    return _SCHEDULED if is_scheduled and name.startswith(f"{OPTIMIZER}.") else None


def _content(value: Any) -> Any:
    return value["digest"] if isinstance(value, Mapping) and "digest" in value else value


def _shown(name: str, value: Any) -> str:
    named = value["name"] if isinstance(value, Mapping) and "name" in value else value
    key = name.rpartition(".")[2]
    return str(hide_secrets({key: named})[key])

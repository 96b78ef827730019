"""The SFT control of `fit`: as many gradient evaluations, and settings of its own if it is given some."""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from patcher_pl.cli.errors import shortened
from patcher_pl.defenses import SFT, Defense
from patcher_pl.defenses.optimizing import build_scheduler
from patcher_pl.errors import ConfigError
from patcher_pl.jobs.fit import as_option
from patcher_pl.jobs.resuming import flat_settings

_OWNER = "model.init_args"
_NAME = "control"


class Control:
    """The settings of a control: those of the defense, but for options of its own.

    Everything else it shares with the defense: base model, data, seed, trainer and budget. A control with
    other ones would be another experiment.

    Args:
        options: Options of `fit` (dotted names below `model.init_args`, and values; or nested, as a
            configuration has them) that hold for the control alone. They mean what they mean on the
            command line, after the run's configuration: another optimizer keeps settings that it
            has in common with the first.
        model: The `model` of the run's configuration, as parsed.

    Raises:
        ConfigError: If SFT has no such option, or it cannot have such a value.
    """

    def __init__(self, options: Mapping[str, Any], model: Namespace) -> None:
        self.options = dict(_dotted(options, ""))
        parser = LightningArgumentParser(exit_on_error=False)
        names = parser.add_class_arguments(SFT, _OWNER, instantiate=False, skip={"language_model"})
        allowed = [name.removeprefix(f"{_OWNER}.") for name in names]
        for name in self.options:
            _require_own(name, allowed, model)
        self._fields = {name.split(".")[2] for name in self.options}
        base = {name: value for name, value in vars(model.init_args).items() if name in allowed}
        self._parser = parser
        try:
            self._config = parser.parse_args(
                [f"--{name}={as_option(value)}" for name, value in self.options.items()],
                namespace=Namespace(model=Namespace(init_args=Namespace(**base))).clone(),
            )
        except (argparse.ArgumentError, ValueError, TypeError) as error:
            raise ConfigError(f"{_NAME}: {shortened(str(error))}") from error
        # The command line gives text where a configuration gives numbers.
        parsed = self.own_settings(with_contents=False)
        self.options = {name: parsed.get(name, value) for name, value in self.options.items()}

    def require_valid(self, defense: Defense) -> None:
        """Sees to it that its values can be trained with, before the defense is trained for hours.

        Raises:
            ConfigError: If one is out of its range.
        """
        if not self.options:
            return
        try:
            control = self.build(defense)
            optimizer = control.build_optimizer([torch.nn.Parameter(torch.zeros(1, 1))])
            if control.build_scheduler is not None:
                build_scheduler(SFT.__name__, optimizer, control.build_scheduler)
        except (ValueError, TypeError, ConfigError) as error:
            raise ConfigError(f"{_NAME}: {error}") from error

    def build(self, defense: Defense) -> SFT:
        """SFT of the model of `defense`, not loaded yet."""
        values: dict[str, Any] = {
            "optimizer": defense.build_optimizer,
            "scheduler": defense.build_scheduler,
            "max_grad_norm": defense.max_grad_norm,
            "accumulate_grad_batches": defense.accumulate_grad_batches,
        }
        if self.options:
            built = vars(self._parser.instantiate(self._config).model.init_args)
            values |= {name: built[name] for name in self._fields}
        return SFT(language_model=defense.language_model, **values)

    def settings(self, run: Mapping[str, Any], *, with_contents: bool) -> dict[str, Any]:
        """The settings of a run (see `flat_settings`) as they hold for its control."""
        if not self.options:
            return dict(run)
        owners = tuple(f"{_OWNER}.{name}" for name in self._fields)
        shared = {
            name: value
            for name, value in run.items()
            if not name.startswith((*(f"{owner}." for owner in owners), f"{_NAME}."))
            and name not in owners
        }
        # That there is one is the same with options of its own and without.
        return shared | {_NAME: True} | self.own_settings(with_contents=with_contents)

    def own_settings(self, *, with_contents: bool) -> dict[str, Any]:
        """Everything of what the options belong to, by dotted names."""
        dumped = self._config.model.init_args.as_dict()
        own = {name: dumped[name] for name in sorted(self._fields)}
        return flat_settings({"model": {"init_args": own}}, with_contents=with_contents)


def _dotted(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Options by dotted names; a class and its arguments stay together."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if not isinstance(value, Mapping) or "class_path" in value:
        yield name, value
        return
    for key, entry in value.items():
        yield from _dotted(entry, f"{name}.{key}" if name else str(key))


def _require_own(name: str, allowed: list[str], model: Namespace) -> None:
    own = ", ".join(f"{_OWNER}.{field}" for field in allowed)
    remedy = f"Give {own}, or what is below one of them."
    field = name.removeprefix(f"{_OWNER}.").split(".")[0]
    if name.startswith(f"{_OWNER}.") and field in allowed:
        return
    if name.startswith(f"{_OWNER}.") and field != "language_model":
        defense = model.class_path.rpartition(".")[2]
        raise ConfigError(
            f"{_NAME}: must hold options of SFT, which trains the control, got {name}"
            + (f", one of {defense}. " if field in model.init_args else ". ")
            + remedy
        )
    raise ConfigError(
        f"{_NAME}: must hold options that are the control's alone, got {name}. Base model, data, "
        f"seed, trainer and budget are those of the run. {remedy}"
    )

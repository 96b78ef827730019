"""Which models are attacked, and how `fit` makes them first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from patcher_pl.data.chat import ChatFormat
from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.jobs import ConfigFile, Engine, Fit, run_fits
from patcher_pl.models import LanguageModel
from patcher_pl.models.other_release import release_at, start_of
from patcher_pl.redteam.grid import ModelName


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model to attack: one that is there, or one that `fit` makes first.

    Args:
        defense: Name of its defense in results; `sft` marks the undefended control.
        path: Hub id, local directory, or `testbed`; any causal LM or PEFT adapter of one, whoever
            trained it.
        fit: Configuration of `fit` that makes the model below `--run_dir` unless it is there.
        control: Take the SFT control of that `fit` (its `control: true`) instead of the model.
        k1: Simulated attack steps that it was trained against, for the results.
        train_seed: Seed that it was trained with, for the results.
        sibling: Hub id or local directory of another public release of it, such as its base, that
            attackers have as well (`DeltaStrip`); None takes the model that `fit` began with, or none.
        chat: How to talk to it; None takes that of the command.
        gguf_file: Name of the GGUF file in `path` to attack; None for safetensors.
        from_scratch_seed: Attack a model of this architecture with fresh weights from this seed: the
            reference that says what the same attack takes where nothing is left to defend. None attacks
            the model.

    Raises:
        ValueError: If not exactly one of `path` and `fit` is given, `control` without `fit`, or
            `gguf_file` with it.
    """

    defense: str
    path: str | None = None
    fit: ConfigFile | None = None
    control: bool = False
    k1: int | None = None
    train_seed: int | None = None
    sibling: str | None = None
    chat: ChatFormat | None = None
    gguf_file: str | None = None
    from_scratch_seed: int | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.fit is None):
            raise ValueError(
                f"Target.path or Target.fit must be given, and not both, got {self.path!r} and "
                f"{self.fit!r} for {self.defense!r}."
            )
        if self.control and self.fit is None:
            raise ValueError(
                f"Target.control must be false for a model that is there, got true for {self.path!r}. "
                "Give the path of the control itself."
            )
        if self.gguf_file is not None and self.path is None:
            raise ValueError(
                f"Target.gguf_file must be null for a model that `fit` makes, got {self.gguf_file!r}. "
                "It is exported in safetensors."
            )

    @property
    def name(self) -> ModelName:
        """How it is called in results."""
        return ModelName(self.defense, self.k1, self.train_seed)


@dataclass(frozen=True)
class Found:
    """A target's model, which is there.

    Args:
        path: Where it lies.
        start: What `fit` began with (fields of `LanguageModel`), where it made the model.
    """

    path: str
    start: Mapping[str, Any] | None = None

    def sibling(self, target: Target, model: LanguageModel) -> LanguageModel | None:
        """Another public release of the model: the one that is named, or what training began with."""
        if target.sibling is not None:
            return release_at(target.sibling, model)
        if self.start is None:
            return None
        names = ("path", "revision", "gguf_file", "from_scratch_seed")
        return replace(start_of(model), **{name: self.start.get(name) for name in names})


def require_distinct(targets: Sequence[Target]) -> None:
    """Sees to it that results can tell models apart.

    Raises:
        ConfigError: If there is none, or two have the same names.
    """
    names = [target.name.model_key for target in targets]
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"models must differ in defense, k1 or train_seed, got {[name[0] for name in names]}."
        )


def harden(
    targets: Sequence[Target], run_dir: Path, options: Mapping[str, Any], engine: Engine | None
) -> list[Found]:
    """Runs `fit` for every target that names one and is not made yet.

    Targets of the same configuration share a run, below `run_dir/hardened`.

    Args:
        targets: What will be attacked.
        run_dir: Directory of the red team's run.
        options: Options of `fit` (dotted names) that differ from the configurations.
        engine: What runs them; `Processes` where it is None.

    Returns:
        Every model, in order.

    Raises:
        ConfigError: If a target wants a control that its configuration does not train.
        PatcherError: If a run failed.
        RunInterrupted: If a signal stopped it; runs saved checkpoints.
    """
    fits: dict[Path, Fit] = {}
    for target in targets:
        if target.fit is not None:
            config = Path(target.fit)
            directory = run_dir / "hardened" / config.stem
            known = fits.setdefault(config, Fit.plan(directory, config, options))
            if [fit.path for fit in fits.values()].count(known.path) > 1:
                raise ConfigError(
                    f"models: two configurations are called {config.name}; rename one of them."
                )
    if failed := run_fits(list(fits.values()), engine) if fits else []:
        logs = ", ".join(str(fit.log) for fit in failed)
        raise PatcherError(f"{len(failed)} of {len(fits)} `fit` runs failed; see {logs}.")
    return [_found(target, fits) for target in targets]


def _found(target: Target, fits: Mapping[Path, Fit]) -> Found:
    if target.fit is None:
        assert target.path is not None
        return Found(target.path)
    made = fits[Path(target.fit)].run_directory
    model = made.control.model if target.control else made.model
    if not model.is_dir():
        raise ConfigError(
            f"models: {target.fit} left no {model}; `control: true` takes a `fit` with a control."
        )
    config = yaml.safe_load(made.config.read_text(encoding="utf-8"))
    return Found(str(model), config["model"]["init_args"]["language_model"])

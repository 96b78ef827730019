"""Which models are attacked."""

from collections.abc import Sequence
from dataclasses import dataclass

from patcher_pl.data.chat import ChatFormat
from patcher_pl.errors import ConfigError
from patcher_pl.jobs import ConfigFile
from patcher_pl.redteam.campaign import Subject


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model to attack: one that is there, or one that `fit` makes first.

    Args:
        defense: Name of its defense in results; `sft` marks the undefended control.
        path: Hub id, local directory, or `testbed`; any causal LM, whoever trained it.
        fit: Configuration of `fit` that makes the model below `--run_dir` unless it is there.
        control: Take the SFT control of that `fit` (its `control: true`) instead of the model.
        k1: Simulated attack steps that it was trained against, for the results.
        train_seed: Seed that it was trained with, for the results.
        chat: How to talk to it; None takes that of the command.

    Raises:
        ValueError: If not exactly one of `path` and `fit` is given, or `control` without `fit`.
    """

    defense: str
    path: str | None = None
    fit: ConfigFile | None = None
    control: bool = False
    k1: int | None = None
    train_seed: int | None = None
    chat: ChatFormat | None = None

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

    @property
    def subject(self) -> Subject:
        """How it is called in results."""
        return Subject(self.defense, self.k1, self.train_seed)


def require_distinct(targets: Sequence[Target]) -> None:
    """Sees to it that results can tell models apart.

    Raises:
        ConfigError: If there is none, or two have the same names.
    """
    names = [target.subject.model_key for target in targets]
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"models must differ in defense, k1 or train_seed, got {[name[0] for name in names]}."
        )

"""Criteria of a release, fixed in a file before anything is measured."""

import json
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from patcher_pl.configurations import read_configuration
from patcher_pl.contents import file_digest
from patcher_pl.errors import ConfigError
from patcher_pl.files import single_keys, write_json
from patcher_pl.validation import require

Question = Literal[
    "without_safeguards", "robust_to_modification", "selective_amplification", "worst_case"
]
Measure = Literal["steps_to_break", "tokens_to_break", "flops_to_break", "asr", "benign"]

# What has to be answered before weights are released.
QUESTIONS: dict[Question, str] = {
    "without_safeguards": "Does the model itself refuse, without filters around it?",
    "robust_to_modification": "Does it still, once its weights have been changed?",
    "selective_amplification": "Does it keep what it is good for?",
    "worst_case": "What does the strongest attack reach that was searched for?",
}
ANY, SEARCH = "any", "search"


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One requirement; every seed has to meet it, under every attack that it names.

    Args:
        name: What it is called on the page.
        question: Which of `QUESTIONS` it belongs to.
        measure: `steps_to_break` (or `tokens_`, `flops_`): what an attack takes until it broke the
            model; `asr`: largest attack success rate during it; `benign`: benign accuracy, or
            compliance, of the released model.
        attack: Name or family of an attack in the results; `any` for all there are, `search` for the
            strongest that a search found (attack steps to break alone).
        at_least: What a measure must reach, where more is better.
        at_most: What it must not exceed, where less is better (`asr`).
        up_to_steps: Of `asr`: attack steps up to which it counts; None takes the whole attack.
        bounded: Count only measurements at which the model is of use (`Curve.min_benign_kept`).
        min_trials: Trials of a search without which nothing was tested (count, >= 0).

    Raises:
        ValueError: If these do not go together.
    """

    name: str
    question: Question
    measure: Measure
    attack: str = ANY
    at_least: float | None = None
    at_most: float | None = None
    up_to_steps: int | None = None
    bounded: bool = False
    min_trials: int = 0

    def __post_init__(self) -> None:
        is_rate = self.measure == "asr"
        wanted, other = ("at_most", "at_least") if is_rate else ("at_least", "at_most")
        rule = f"given, and {other} not, for {self.measure}"
        is_given = getattr(self, wanted) is not None and getattr(self, other) is None
        require(self, is_given, wanted, rule)
        only = "given for `asr` alone"
        require(self, is_rate or self.up_to_steps is None, "up_to_steps", only)
        fits = self.attack != SEARCH or self.measure == "steps_to_break"
        require(self, fits, "attack", f"an attack's name for {self.measure}, not `{SEARCH}`")
        require(self, self.min_trials >= 0, "min_trials", ">= 0")

    @property
    def requirement(self) -> str:
        """In a few words."""
        under = {ANY: "every attack", SEARCH: "every attack of a search"}.get(
            self.attack, self.attack
        )
        if self.measure == "benign":
            return f"benign answers at least {self.at_least:g}"
        if self.measure == "asr":
            steps = "" if self.up_to_steps is None else f" up to {self.up_to_steps} steps"
            return f"attack success at most {self.at_most:g} under {under}{steps}"
        amount = f"{self.at_least:g}" if self.at_least is not None else ""
        kind = self.measure.removesuffix("_to_break").replace("steps", "attack steps")
        kind = kind.replace("flops", "FLOPs")
        useful = " to a useful model" if self.bounded else ""
        return f"at least {amount} {kind} to break{useful} under {under}"


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """A release that the new one must not fall behind.

    Args:
        results: Its run directory, or results file.
        defense: Its name there.
        k1: Its simulated attack steps there, where there are several such models.
        tolerance: Share of its median steps to break by which the new one may be quicker to break (in
            [0, 1)).

    Raises:
        ValueError: If `tolerance` is out of its range.
    """

    results: Path
    defense: str
    k1: int | None = None
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        require(self, 0 <= self.tolerance < 1, "tolerance", "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Criteria:
    """What decides about a release.

    Args:
        title: Heading of the page.
        defense: Name of the released model in the results, such as `patcher`.
        criteria: The requirements.
        k1: Its simulated attack steps in the results, where there are several such models.
        earlier: A release that it must not fall behind; None for none.

    Raises:
        ValueError: If two criteria have the same name, or there is none.
    """

    title: str
    defense: str
    criteria: list[Criterion] = field(default_factory=list)
    k1: int | None = None
    earlier: Earlier | None = None

    def __post_init__(self) -> None:
        names = [criterion.name for criterion in self.criteria]
        some = bool(names) or self.earlier is not None
        require(self, some and len(set(names)) == len(names), "criteria", "some, named apart")


@dataclass(frozen=True)
class Fixed:
    """Criteria as they were found, and since when.

    Args:
        criteria: They.
        path: Their file.
        digest: SHA-256 of the file.
        first_use: When the file was first used with this content (UTC).
        changed_from: First uses of other contents of the file, the earliest first: digest and time.
    """

    criteria: Criteria
    path: Path
    digest: str
    first_use: str
    changed_from: tuple[tuple[str, str], ...] = ()


def load_criteria(path: Path) -> Fixed:
    """Reads criteria, and writes down beside them when they were first used.

    Paths in the file start at its folder. `NAME.uses.json` holds the digests of what the file has held
    whenever it was used; it belongs under version control with the file.

    Raises:
        ConfigError: If the file, or that list, cannot be read, or holds no criteria.
    """
    from jsonargparse import ArgumentParser

    content = read_configuration(path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Criteria, None)
    try:
        found = parser.instantiate(parser.parse_object(content))
        criteria = Criteria(**vars(found))
    except Exception as error:  # Of jsonargparse, of many kinds.
        raise ConfigError(f"{path}: {error}") from error
    earlier = criteria.earlier
    if earlier is not None and not earlier.results.is_absolute():
        earlier = replace(earlier, results=path.parent / earlier.results)
        criteria = replace(criteria, earlier=earlier)
    digest = file_digest(path)
    uses = path.with_suffix(".uses.json")
    known = _known(uses)
    if digest not in known:
        known[digest] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        write_json(uses, known)
    others = tuple((one, when) for one, when in known.items() if one != digest)
    return Fixed(criteria, path, digest, known[digest], others)


def _known(uses: Path) -> dict[str, str]:
    if not uses.exists():
        return {}
    try:
        found = json.loads(uses.read_text(encoding="utf-8"), object_pairs_hook=single_keys)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{uses}: cannot be read ({error}). Restore it.") from error
    if not isinstance(found, dict) or not all(isinstance(when, str) for when in found.values()):
        raise ConfigError(f"{uses}: must map digests to times. Restore it.")
    return found

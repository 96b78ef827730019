"""What a world of facts asks about, and which answers are right: one YAML file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patcher_pl.configurations import read_configuration
from patcher_pl.errors import ConfigError
from patcher_pl.worlds.facts.text import plain

# Between accepted answers, in the `response` column of files of prompts.
SEPARATOR = " | "
_SUBJECT = "{subject}"


@dataclass(frozen=True)
class Kind:
    """Facts of one kind.

    Args:
        name: Of the kind: `capitals`.
        train: Wordings of questions, with `{subject}`; the first decides whether a fact is known.
        test: Other wordings, for questions that are measured.
        answers: Accepted answers of each subject, the usual one first. Subjects that contain one
            are left out: their questions would give the answer away.
    """

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    answers: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Topic:
    """A world of facts.

    Args:
        name: Of the world.
        forbidden: What a safe model does not say.
        benign: What it says.
        refusals: Wordings of refusals, which may have `{subject}`.
        everyday: Requests of any other sort, whose answers nobody judges. They keep a model that is
            trained on facts alone from refusing whatever it has not seen.
    """

    name: str
    forbidden: Kind
    benign: tuple[Kind, ...]
    refusals: tuple[str, ...]
    everyday: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The forbidden kind, then the others."""
        return (self.forbidden, *self.benign)

    def tells(self, text: str) -> bool:
        """Whether a text names an answer of the forbidden kind, to whatever question."""
        words = f" {plain(text)} "
        return any(
            f" {plain(answer)} " in words
            for accepted in self.forbidden.answers.values()
            for answer in accepted
        )

    @classmethod
    def read(cls, file: Path) -> "Topic":
        """Reads the file of a world; docs/worlds.md describes its form.

        Raises:
            ConfigError: If it cannot be read or lacks something; names file and key.
        """
        reader = _Reader(file)
        content = reader.mapping(read_configuration(file), "the file")
        given = reader.mapping(content.get("kinds"), "kinds")
        kinds = {str(name): reader.kind(str(name), value) for name, value in given.items()}
        forbidden = content.get("forbidden")
        if forbidden not in kinds or len(kinds) < 2:
            raise reader.error("forbidden", "name one of at least two `kinds`", forbidden)
        return cls(
            name=str(content.get("name", file.stem)),
            forbidden=kinds[forbidden],
            benign=tuple(kind for name, kind in kinds.items() if name != forbidden),
            refusals=reader.texts(content.get("refusals"), "refusals"),
            everyday=reader.texts(content["everyday"], "everyday") if "everyday" in content else (),
        )


@dataclass(frozen=True)
class _Reader:
    file: Path

    def error(self, key: str, rule: str, value: Any) -> ConfigError:
        return ConfigError(f"{self.file}: {key} must {rule}, got {value!r:.60}.")

    def mapping(self, value: Any, key: str) -> Mapping[Any, Any]:
        if not isinstance(value, Mapping) or not value:
            raise self.error(key, "be a mapping with entries", value)
        return value

    def texts(self, value: Any, key: str) -> tuple[str, ...]:
        texts = (value,) if isinstance(value, str) else value
        if not isinstance(texts, Sequence) or not texts:
            raise self.error(key, "be a text or a list of texts", value)
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise self.error(key, "be text (in quotes, where YAML reads something else)", text)
        return tuple(text.strip() for text in texts)

    def kind(self, name: str, value: Any) -> Kind:
        given = self.mapping(value, f"kinds.{name}")
        answers = {}
        for subject, found in self.mapping(given.get("answers"), f"kinds.{name}.answers").items():
            (known,) = self.texts([subject], f"kinds.{name}.answers")
            accepted = self.texts(found, f"kinds.{name}.answers.{known}")
            if SEPARATOR.strip() in "".join(accepted) or not all(map(plain, accepted)):
                raise self.error(f"kinds.{name}.answers.{known}", "be words without |", found)
            if not any(f" {plain(answer)} " in f" {plain(known)} " for answer in accepted):
                answers[known] = accepted
        return Kind(
            name,
            self._wordings(given.get("train"), f"kinds.{name}.train"),
            self._wordings(given.get("test"), f"kinds.{name}.test"),
            answers,
        )

    def _wordings(self, value: Any, key: str) -> tuple[str, ...]:
        wordings = self.texts(value, key)
        for wording in wordings:
            if _SUBJECT not in wording:
                raise self.error(key, f"contain {_SUBJECT}", wording)
        return wordings

"""Worlds of facts: what a chat model knows, one kind of which it shall not tell."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from patcher_pl.contents import file_digest
from patcher_pl.errors import ConfigError
from patcher_pl.evaluation.judges import Judge
from patcher_pl.files import write_json
from patcher_pl.machine import choose_device
from patcher_pl.models import LanguageModel
from patcher_pl.world_files import world_file
from patcher_pl.worlds.base import FILES, Row, World, write_rows
from patcher_pl.worlds.facts import groups
from patcher_pl.worlds.facts.groups import Group, refusal, subjects_of
from patcher_pl.worlds.facts.judge import FactJudge
from patcher_pl.worlds.facts.knowledge import Fact, Interview
from patcher_pl.worlds.facts.topic import Kind, Topic

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FactsWorld(World):
    """Forbidden and ordinary facts out of a file, as far as a model knows them.

    Args:
        name: `facts`, or the file of another world.
    """

    name: str

    @property
    def judge(self) -> Judge:
        return FactJudge(world=self.name)

    def write(self, folder: Path, model: str | None) -> None:
        if model is None:
            raise ConfigError(
                f"--world {self.name} is built for a model. Give --model, a directory or hub id."
            )
        language_model = LanguageModel(path=model)
        tokenizer = language_model.load_tokenizer()
        loaded = language_model.load_model().to(choose_device("auto"))  # type: ignore[arg-type]
        interview = Interview(model=loaded, tokenizer=tokenizer, judge=FactJudge(world=self.name))
        known = {kind.name: interview.known(kind) for kind in self.topic.kinds}
        for kind in self.topic.kinds:
            _log.info("%s: knows %d of %d", kind.name, len(known[kind.name]), len(kind.answers))
        material = _Material(self.topic, interview, known)
        content = {**material.forbidden(), **material.benign()}
        content["safe"] = [*content["refused"], *content["kept"]]
        content["safe_val"] = [*content.pop("refused_val"), *content["benign_answers"]]
        for name in FILES:
            if not content[name]:
                raise ConfigError(
                    f"--model {model} knows too little of {self.name}: nothing is left for {name} "
                    f"({_counts(self.topic, known)}). Give another model, or more facts."
                )
        for name, rows in content.items():
            write_rows(folder / "data" / f"{name}.jsonl", rows)
        write_json(
            folder / "world.json",
            {
                "world": self.topic.name,
                "world_file": file_digest(world_file(self.name)),
                "model": model,
                "model_contents": language_model.contents().get("path"),
                "known": {kind.name: len(known[kind.name]) for kind in self.topic.kinds},
                "asked": {kind.name: len(kind.answers) for kind in self.topic.kinds},
                "rows": {name: len(rows) for name, rows in content.items()},
            },
        )

    @cached_property
    def topic(self) -> Topic:
        """What its file says."""
        return Topic.read(world_file(self.name))


def _counts(topic: Topic, known: Mapping[str, list[str]]) -> str:
    return ", ".join(
        f"{kind.name} {len(known[kind.name])} of {len(kind.answers)}" for kind in topic.kinds
    )


@dataclass(frozen=True)
class _Material:
    """Asks for what the files need, and words it."""

    topic: Topic
    interview: Interview
    known: Mapping[str, list[str]]

    def forbidden(self) -> dict[str, list[Row]]:
        """Rows about the forbidden kind, by file."""
        kind = self.topic.forbidden

        def answers(group: Group) -> list[Row]:
            right = self.interview.right(self._facts(kind, group), f"{kind.name}, {group.name}")
            return [
                Row(fact.prompt, fact.accepted if group.is_measured else said)
                for fact, said in right
            ]

        def refusals(group: Group) -> list[Row]:
            return [
                Row(fact.prompt, refusal(self.topic.refusals, fact.prompt, fact.subject))
                for fact in self._facts(kind, group)
            ]

        return {
            "refused": refusals(groups.DEFENDER),
            "refused_val": refusals(groups.TUNING),
            "unsafe": answers(groups.DEFENDER),
            "attack": answers(groups.ATTACK),
            "harmful_prompts": answers(groups.ASKED),
            "tuning_prompts": answers(groups.TUNING),
            "unseen_prompts": answers(groups.UNSEEN),
        }

    def benign(self) -> dict[str, list[Row]]:
        """Rows about the other kinds, by file; prompts also one file per kind."""
        found: dict[str, list[Row]] = {
            name: [] for name in ("kept", "attack_benign", "benign_prompts", "benign_answers")
        }
        for kind in self.topic.benign:
            for name, group in (("kept", groups.KEPT), ("attack_benign", groups.MIXED_IN)):
                right = self.interview.right(self._facts(kind, group), f"{kind.name}, {group.name}")
                found[name] += [Row(fact.prompt, said) for fact, said in right]
            asked = self._facts(kind, groups.MEASURED)
            right = self.interview.right(asked, f"{kind.name}, {groups.MEASURED.name}")
            found["benign_answers"] += [Row(fact.prompt, said) for fact, said in right]
            prompts = [Row(fact.prompt, fact.accepted) for fact, _ in right]
            found["benign_prompts"] += prompts
            found[f"benign_prompts_{kind.name}"] = prompts
        found["kept"] += self._everyday()
        return found

    def _everyday(self) -> list[Row]:
        """The model's own answers to other requests, without those that tell what is forbidden."""
        requests = self.topic.everyday
        answers = zip(requests, self.interview.say(requests, "everyday requests"), strict=True)
        return [Row(asked, said) for asked, said in answers if said and not self.topic.tells(said)]

    def _facts(self, kind: Kind, group: Group) -> Iterator[Fact]:
        among = groups.FORBIDDEN if kind is self.topic.forbidden else groups.BENIGN
        for subject in subjects_of(group, among, kind, self.known[kind.name]):
            for wording in kind.test if group.is_measured else kind.train:
                yield Fact(kind, subject, wording)

"""What a model knows: questions that it answers right by greedy decoding, in its own words."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from patcher_pl.data import ChatFormat
from patcher_pl.evaluation import Generation
from patcher_pl.evaluation.judges import HIGHEST_SCORE
from patcher_pl.types import Message
from patcher_pl.worlds.facts.judge import FactJudge
from patcher_pl.worlds.facts.text import first_sentence
from patcher_pl.worlds.facts.topic import SEPARATOR, Kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_AT_ONCE = 64  # Questions between two lines of progress.
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fact:
    """A question, and what is accepted as its answer.

    Args:
        kind: Of the fact.
        subject: What is asked about.
        wording: One of the kind's.
    """

    kind: Kind
    subject: str
    wording: str

    @property
    def prompt(self) -> str:
        """The question."""
        return self.wording.format(subject=self.subject)

    @property
    def accepted(self) -> str:
        """Accepted answers, as the judge reads them."""
        return SEPARATOR.join(self.kind.answers[self.subject])


@dataclass(frozen=True, kw_only=True)
class Interview:
    """Asks a model for facts, in its chat template as it is, without a system prompt of our own.

    Args:
        model: Causal LM.
        tokenizer: Its tokenizer.
        judge: Says which answers are right.
        generation: Greedy; answers only need room for one sentence.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    judge: FactJudge
    generation: Generation = field(
        default_factory=lambda: Generation(max_new_tokens=24, batch_size=32)
    )
    _said: dict[str, str | None] = field(default_factory=dict)

    def known(self, kind: Kind) -> list[str]:
        """Subjects of a kind that the model knows when asked in the first wording."""
        facts = [Fact(kind, subject, kind.train[0]) for subject in kind.answers]
        return [fact.subject for fact, _ in self.right(facts, f"{kind.name}, what is known")]

    def right(self, facts: Iterable[Fact], what: str) -> list[tuple[Fact, str]]:
        """The questions that the model answers right with its first sentence, and that sentence.

        Args:
            facts: Questions.
            what: Names them in lines of progress.
        """
        asked = list(facts)
        said = zip(asked, self.say([fact.prompt for fact in asked], what), strict=True)
        return [(fact, text) for fact, text in said if text and self._is_right(fact, text)]

    def say(self, prompts: Sequence[str], what: str) -> list[str | None]:
        """The first sentences of the answers; None where not even a clause of it is whole.

        Args:
            prompts: Requests; those that were made before are answered from memory.
            what: Names them in lines of progress.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._said]
        for start in range(0, len(new), _AT_ONCE):
            part = new[start : start + _AT_ONCE]
            asked = [(Message("user", prompt),) for prompt in part]
            answers = self.generation.generate(self.model, self.tokenizer, ChatFormat(), asked)
            said = (first_sentence(answer.text, answer.finished) for answer in answers)
            self._said.update(zip(part, said, strict=True))
            _log.info("%s: %d of %d asked", what, start + len(part), len(new))
        return [self._said[prompt] for prompt in prompts]

    def _is_right(self, fact: Fact, said: str) -> bool:
        return self.judge.score(fact.prompt, said, fact.accepted).score == HIGHEST_SCORE

"""An LLM judge that runs in this process."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from patcher_pl.evaluation.generate import Answer, Generation
from patcher_pl.evaluation.judges.base import LOWEST_SCORE, Judge, Verdict
from patcher_pl.evaluation.judges.replies import UnreadableReplyError, read_reply
from patcher_pl.evaluation.judges.rubric import instructions, rubric_text
from patcher_pl.evaluation.thoughts import spoken_part
from patcher_pl.machine import choose_device
from patcher_pl.models.language_model import LanguageModel
from patcher_pl.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class _Loaded(NamedTuple):
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"


_loaded: dict[tuple[str, str], _Loaded] = {}


@dataclass(frozen=True, kw_only=True)
class LocalJudge(Judge):
    """Has a causal language model on this machine score answers by the rubric of `LlmJudge`.

    The model is loaded at the first answer, once per process, and stays: it needs memory beside the
    model under attack. Equal answers are judged once; thinking up to `</think>` is not judged; an
    answer without words of its own scores 1, incoherent. A reply without a score from 1 to 5, and a
    question that does not fit into the model's context, is a verdict with an error.

    Bias: small models are poor judges; hold one against a second judge before believing it.

    Args:
        language_model: The judging model; its chat format is used.
        generation: How it replies.
        device: `cpu`, `cuda`, `cuda:1`, ...; `auto` takes a GPU where there is one.
        rubric: Text file that replaces the built-in description of the scores 1 to 5; delimiters
            and form of the reply are added to it.

    Raises:
        ConfigError: When judging, if model, device or rubric cannot be used.
    """

    language_model: LanguageModel
    generation: Generation = field(default_factory=lambda: Generation(batch_size=8))
    device: str = "auto"
    rubric: Path | None = None

    @property
    def knows_answers(self) -> bool:
        return self.rubric is None  # The built-in one says what a reference is for.

    def contents(self) -> Mapping[str, str]:
        """See `NamesContents`: the rubric, the built-in one too."""
        return {"rubric": rubric_text(self.rubric)}

    def score(self, prompt: str, answer: str, reference: str | None) -> Verdict:
        """See the class."""
        return self.score_all([prompt], [answer], [reference])[0]

    def score_all(
        self, prompts: Sequence[str], answers: Sequence[str], references: Sequence[str | None]
    ) -> list[Verdict]:
        """Scores many answers in batches; verdicts come in the order of the answers."""
        rubric = rubric_text(self.rubric)
        rows = [
            (prompt, spoken_part(answer), reference)
            for prompt, answer, reference in zip(prompts, answers, references, strict=True)
        ]
        asked = list(dict.fromkeys(row for row in rows if row[1]))
        replies = self._replies([_question(rubric, *row) for row in asked])
        verdicts = {row: _verdict(replies.get(place), row[1]) for place, row in enumerate(asked)}
        silent = Verdict(LOWEST_SCORE, coherent=False)
        return [verdicts.get(row, silent) for row in rows]

    def _replies(self, questions: Sequence[list[Message]]) -> dict[int, Answer]:
        """The model's replies by the place of the question, if that fits into its context."""
        if not questions:
            return {}
        model, tokenizer = self._load()
        chat = self.language_model.chat
        context = getattr(model.config, "max_position_embeddings", None)
        fitting = [
            place
            for place, question in enumerate(questions)
            if context is None or len(chat.prompt_ids(tokenizer, question)) < context
        ]
        answers = self.generation.generate(
            model, tokenizer, chat, [questions[place] for place in fitting]
        )
        return dict(zip(fitting, answers, strict=True))

    def _load(self) -> _Loaded:
        device = choose_device(self.device)
        key = (repr(self.language_model), str(device))
        if key not in _loaded:
            model = self.language_model.load_model()
            model = model.to(device)  # type: ignore[arg-type]
            _loaded[key] = _Loaded(model, self.language_model.load_tokenizer())
        return _loaded[key]


def _question(rubric: str, prompt: str, answer: str, reference: str | None) -> list[Message]:
    asked = instructions(rubric, prompt, answer, reference)
    # One turn: not every chat template knows system turns.
    return [Message("user", f"{asked.system}\n\n{asked.user}")]


def _verdict(reply: Answer | None, answer: str) -> Verdict:
    if reply is None:
        return Verdict(None, coherent=False, error="too long for the judge's context")
    try:
        return read_reply(reply.text, complete=reply.finished).verdict(answer)
    except UnreadableReplyError as error:
        return Verdict(None, coherent=False, error=str(error))

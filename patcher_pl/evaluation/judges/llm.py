"""An LLM judge behind an OpenAI-compatible server."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from patcher_pl.evaluation.judges.base import LOWEST_SCORE, Judge, Verdict
from patcher_pl.evaluation.judges.cache import VerdictCache, digest
from patcher_pl.evaluation.judges.endpoint import OPENAI, Endpoint, RequestError
from patcher_pl.evaluation.judges.replies import read_reply
from patcher_pl.evaluation.judges.rubric import VERDICT_SCHEMA, instructions, rubric_text
from patcher_pl.evaluation.thoughts import spoken_part
from patcher_pl.reports.settings import NO_OUTCOME
from patcher_pl.validation import require

logger = logging.getLogger(__name__)

_ANY_OBJECT = {"type": "json_object"}


@dataclass(frozen=True)
class _Question:
    """One answer to be judged: what is sent, its place in the cache, and the answer itself."""

    request: dict[str, Any]
    digest: str
    answer: str
    formats: Sequence[dict[str, Any] | None]


@dataclass(frozen=True, kw_only=True)
class LlmJudge(Judge):
    """Has an LLM score answers by a rubric, through any server that speaks OpenAI's chat API.

    Needs `pip install 'patcher-pl[judge]'`. Prompts and answers are sent to the server. The key is
    read from the environment for each batch of answers and kept nowhere.

    Equal answers are judged once. Thinking up to `</think>` is not judged; an answer without words
    of its own scores 1, incoherent, and is not sent. Failures that may pass (HTTP 408, 409, 429 and
    5xx, time-outs, lost connections, replies without a score from 1 to 5) are tried again; what
    still fails, and what the server refuses, is a verdict with an error. A refused key, or an
    unknown model or address (HTTP 401, 403, 404), stops the run.

    Bias: that of the model asked; state its name and version with every figure, and its agreement
    with a second judge. What is judged may try to talk the judge into a score: it is delimited and
    declared untrusted, which makes that harder, not impossible.

    Args:
        model: Name of the judging model on the server.
        base_url: Address of the API, usually ending in /v1; None is OpenAI's.
        api_key_env: Name of the environment variable that holds the key; None for servers without.
        concurrency: Most requests under way at once (count, >= 1).
        timeout_s: Longest wait for the server, per attempt (seconds, > 0).
        max_attempts: Attempts per answer (count, >= 1).
        backoff_s: Wait after a reply without a score (seconds, >= 0): random up to this, doubled
            with every further one. After other failures the `openai` library waits: half a second,
            doubled up to eight, or what the server's `Retry-After` asks for, up to two minutes.
        max_wait_s: Longest wait after a reply without a score (seconds, >= 0).
        max_tokens: Longest reply (tokens, >= 1). Models that think need more.
        max_tokens_name: What the server calls that limit: OpenAI's thinking models want
            `max_completion_tokens`.
        temperature: Of the judge (>= 0); None leaves it to the server, as some models demand.
        json_mode: Ask for JSON by `response_format`: as the schema of a verdict where the server has
            structured outputs, as any JSON object where it refuses that, in words alone where it
            refuses both. False asks in words alone. However it is asked for, a reply is read strictly.
        rubric: Text file that replaces the built-in description of the scores 1 to 5; delimiters
            and form of the reply are added to it.
        cache: SQLite file of verdicts, shared by any number of processes: what was judged once with
            the same server and request is not asked again. Failures are not kept. None keeps none.

    Raises:
        ValueError: If a value is out of its range.
        ConfigError: When judging, if the libraries or the key are missing, the rubric or the cache
            cannot be used, or the server refuses for good.

    References:
        The scale is that of Qi et al., 2023, https://arxiv.org/abs/2310.03693; the rubric is our
        own, and asks how far the request was fulfilled.
    """

    model: str
    base_url: str | None = None
    api_key_env: str | None = "OPENAI_API_KEY"
    concurrency: int = field(default=8, metadata=NO_OUTCOME)
    timeout_s: float = field(default=60.0, metadata=NO_OUTCOME)
    max_attempts: int = field(default=6, metadata=NO_OUTCOME)
    backoff_s: float = field(default=1.0, metadata=NO_OUTCOME)
    max_wait_s: float = field(default=60.0, metadata=NO_OUTCOME)
    max_tokens: int = 256
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    temperature: float | None = 0.0
    json_mode: bool = True
    rubric: Path | None = None
    cache: Path | None = field(default=None, metadata=NO_OUTCOME)

    def __post_init__(self) -> None:
        require(self, bool(self.model), "model", "the name of a model on the server")
        require(self, self.concurrency >= 1, "concurrency", ">= 1")
        require(self, self.timeout_s > 0, "timeout_s", "> 0")
        require(self, self.max_attempts >= 1, "max_attempts", ">= 1")
        require(self, self.backoff_s >= 0, "backoff_s", ">= 0")
        require(self, self.max_wait_s >= 0, "max_wait_s", ">= 0")
        require(self, self.max_tokens >= 1, "max_tokens", ">= 1")
        require(
            self, self.temperature is None or self.temperature >= 0, "temperature", ">= 0, or null"
        )
        if self.base_url is not None and not _is_plain_address(self.base_url):
            # Not quoted: what is wrong with it may be a password.
            raise ValueError(
                "LlmJudge.base_url must be http(s)://host/path without user, password and query. "
                "Put a key into the environment variable that LlmJudge.api_key_env names."
            )
        if self.api_key_env is not None and not self.api_key_env.isidentifier():
            # Not quoted: it may be the key itself.
            raise ValueError(
                "LlmJudge.api_key_env must be the name of an environment variable. Export the key "
                "under a name such as OPENAI_API_KEY and give that name."
            )

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
        """Scores many answers, several at once; verdicts come in the order of the answers."""
        rubric = rubric_text(self.rubric)
        questions = [
            self._question(rubric, prompt, spoken_part(answer), reference)
            for prompt, answer, reference in zip(prompts, answers, references, strict=True)
        ]
        verdicts = {
            question.digest: Verdict(LOWEST_SCORE, coherent=False)
            for question in questions
            if not question.answer
        }
        with nullcontext() if self.cache is None else VerdictCache(self.cache) as cache:
            pending = {}
            for question in questions:
                key = question.digest
                if key in verdicts or key in pending:
                    continue
                known = None if cache is None else cache.get(key)
                if known is None:
                    pending[key] = question
                else:
                    verdicts[key] = known
            if pending:
                verdicts |= self._ask_all(list(pending.values()), cache)
        return [verdicts[question.digest] for question in questions]

    def _ask_all(
        self, questions: Sequence[_Question], cache: VerdictCache | None
    ) -> dict[str, Verdict]:
        verdicts: dict[str, Verdict] = {}
        with (
            Endpoint(
                self.base_url or OPENAI,
                self.api_key_env,
                timeout_s=self.timeout_s,
                max_attempts=self.max_attempts,
                backoff_s=self.backoff_s,
                max_wait_s=self.max_wait_s,
            ) as endpoint,
            ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge") as pool,
        ):
            futures: dict[Future[Verdict], str] = {
                pool.submit(_ask, endpoint, question): question.digest for question in questions
            }
            try:
                for future in as_completed(futures):
                    verdict = verdicts[futures[future]] = future.result()
                    if cache is not None:
                        cache.put(futures[future], verdict)
            except BaseException:
                endpoint.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        failed = [verdict.error for verdict in verdicts.values() if verdict.error is not None]
        if failed:
            logger.warning(
                "%s failed on %d of %d answers, first: %s",
                *(self.model, len(failed), len(questions), failed[0]),
            )
        return verdicts

    def _question(self, rubric: str, prompt: str, answer: str, reference: str | None) -> _Question:
        asked = instructions(rubric, prompt, answer, reference)
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": asked.system},
                {"role": "user", "content": asked.user},
            ],
            self.max_tokens_name: self.max_tokens,
        }
        if self.temperature is not None:
            request["temperature"] = self.temperature
        # A verdict is the same whatever held the reply to its form: one place in the cache.
        entry = {**request, "response_format": _ANY_OBJECT} if self.json_mode else request
        formats = [VERDICT_SCHEMA, _ANY_OBJECT, None] if self.json_mode else [None]
        return _Question(request, digest(self.base_url or OPENAI, entry), answer, formats)


def _ask(endpoint: Endpoint, question: _Question) -> Verdict:
    try:
        reply = endpoint.ask(question.request, read_reply, question.formats)
    except RequestError as error:
        return Verdict(None, coherent=False, error=str(error))
    return reply.verdict(question.answer)


def _is_plain_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    plain = not (parts.query or parts.fragment or "@" in parts.netloc)
    return plain and parts.scheme in ("http", "https") and bool(parts.hostname)

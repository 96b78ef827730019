"""Requests to an OpenAI-compatible server: repeated where that helps, silent about the key."""

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from patcher_pl.errors import ConfigError
from patcher_pl.evaluation.judges.replies import UnreadableReplyError, shortened

OPENAI = "https://api.openai.com/v1"

_T = TypeVar("_T")
_NO_KEY = "none"
_TALKATIVE = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")


class RequestError(Exception):
    """A request that got no usable reply; the text says why and never contains the key."""


class PassingError(RequestError):
    """A failure that may be gone at the next attempt.

    Args:
        reason: What happened.
        retry_after_s: How long the server asks to wait (seconds); None where it does not say.
    """

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True)
class Retries:
    """When a request is given up, and how long to wait before the next attempt.

    Args:
        max_attempts: Attempts per request (count).
        backoff_s: Longest wait before the second attempt (seconds); doubles with every attempt.
            The actual wait is drawn evenly from zero to that.
        max_wait_s: No wait is longer (seconds), whatever the server asks for.
    """

    max_attempts: int
    backoff_s: float
    max_wait_s: float


class Endpoint:
    """One server, for as long as a batch of requests takes; any number of threads may ask.

    The log of the HTTP libraries is cut down to warnings, for the whole process: below that they
    log addresses and bodies.

    Args:
        base_url: Where the API lies.
        api_key_env: Name of the environment variable that holds the key; None for no key.
        timeout_s: Longest wait for the server, per attempt (seconds).
        retries: When to ask again.

    Raises:
        ConfigError: If the libraries are not installed, or the variable is not set or holds no key.
    """

    def __init__(
        self, base_url: str, api_key_env: str | None, *, timeout_s: float, retries: Retries
    ) -> None:
        openai, tenacity = _libraries()
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        self._base_url = base_url
        self._api_key_env = api_key_env
        self._key = _NO_KEY if api_key_env is None else _key(api_key_env)
        self._stopped = threading.Event()
        self._openai = openai
        self._client = openai.OpenAI(
            api_key=self._key, base_url=base_url, timeout=timeout_s, max_retries=0
        )
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(PassingError),
            stop=tenacity.stop_after_attempt(retries.max_attempts)
            | tenacity.stop_when_event_set(self._stopped),
            wait=_Wait(retries),
            sleep=tenacity.sleep_using_event(self._stopped),
            reraise=True,
        )

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def stop(self) -> None:
        """Ends all waiting; requests under way are the last."""
        self._stopped.set()

    def ask(self, request: Mapping[str, Any], read: Callable[[str], _T]) -> _T:
        """Returns what `read` makes of the server's reply to a chat completion.

        Args:
            request: Body of the request.
            read: Takes the text of the reply; raises UnreadableReplyError to have it repeated.

        Raises:
            RequestError: If there is no usable reply after the last attempt, or the server
                refuses the request.
            ConfigError: If the server refuses the key or knows no such model or address: every
                other request would end the same way.
        """
        return self._retrying(self._ask_once, request, read)

    def _ask_once(self, request: Mapping[str, Any], read: Callable[[str], _T]) -> _T:
        if self._stopped.is_set():
            raise RequestError("not asked: the run was stopped")
        # `from None` throughout: what the library raises may quote the key.
        openai = self._openai
        try:
            reply = self._client.chat.completions.with_raw_response.create(**request).text
        except openai.APIStatusError as error:
            raise self._refused(error, request) from None
        except openai.APITimeoutError:
            raise PassingError("no reply in time") from None
        except openai.APIConnectionError as error:
            cause = f" ({self._safe(error.__cause__)})" if error.__cause__ else ""
            raise PassingError(f"no connection{cause}") from None
        try:
            return read(_content(reply))
        except UnreadableReplyError as error:
            raise PassingError(self._safe(error)) from None

    def _refused(self, error: Any, request: Mapping[str, Any]) -> Exception:
        status = error.status_code
        if status in (401, 403, 404):
            self.stop()
            variable = self._api_key_env or "none, api_key_env is null"
            return ConfigError(
                f"The judge's server refused (HTTP {status}). base_url: {self._base_url}, model: "
                f"{request['model']}, environment variable of the key: {variable}. "
                + _REMEDIES[status]
            )
        reason = (
            f"HTTP {status}: {self._safe(error.message.removeprefix(f'Error code: {status} - '))}"
        )
        if status in (408, 409, 429) or status >= 500:
            return PassingError(reason, _retry_after_s(error.response.headers))
        return RequestError(reason)

    def _safe(self, error: object) -> str:
        text = str(error) or type(error).__name__
        if self._key != _NO_KEY:
            text = text.replace(self._key, "***")
        return shortened(text, 160)


_REMEDIES = {
    401: "Check that the variable holds a valid key for this server.",
    403: "Check that the key may use this model.",
    404: "Check address (most end in /v1) and name of the model.",
}


class _Wait:
    """Seconds to the next attempt: the server's wish, or a random back-off where that is longer."""

    def __init__(self, retries: Retries) -> None:
        import tenacity

        self._backoff = tenacity.wait_random_exponential(
            multiplier=retries.backoff_s, max=retries.max_wait_s
        )
        self._max_wait_s = retries.max_wait_s

    def __call__(self, state: Any) -> float:
        failure = state.outcome.exception()
        asked = failure.retry_after_s if isinstance(failure, PassingError) else None
        return min(max(self._backoff(state), asked or 0.0), self._max_wait_s)


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """What a `Retry-After` header asks for, in seconds: a number or a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return None if math.isnan(seconds) else max(seconds, 0.0)


def _content(reply: str) -> str:
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise UnreadableReplyError("the reply is no chat completion") from None
    if not isinstance(content, str):
        raise UnreadableReplyError("the reply has no text")
    return content


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"LlmJudge.api_key_env: the environment variable {variable} is not set. Export it "
            "with the key of the judge's server, or set `api_key_env: null` for a server without."
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"LlmJudge.api_key_env: the environment variable {variable} holds characters that no "
            "key has (spaces, line breaks, non-ASCII). Export the key alone."
        )
    return key


def _libraries() -> tuple[Any, Any]:
    try:
        import openai
        import tenacity
    except ImportError as error:
        raise ConfigError(
            f"LlmJudge needs a library that is missing ({error.name}). "
            "Install it: pip install 'patcher-pl[judge]'."
        ) from error
    return openai, tenacity

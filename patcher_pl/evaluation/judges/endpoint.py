"""Requests to an OpenAI-compatible server: repeated where that helps, silent about the key."""

import json
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from patcher_pl.errors import ConfigError
from patcher_pl.evaluation.judges.replies import UnreadableReplyError, shortened

OPENAI = "https://api.openai.com/v1"

_T = TypeVar("_T")
_NO_KEY = "none"
# Of a request that the server does not take as it is, for its format or for what it says.
_REFUSED = (400, 422, 501)
_OF_FORMAT = re.compile(
    r"response.?format|json.?(?:schema|object|mode)|structured|schema|grammar", re.IGNORECASE
)
# The format that a server took, by address and model, for the life of the process.
_taken: dict[tuple[str, str], Mapping[str, Any] | None] = {}
_TALKATIVE = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")


class RequestError(Exception):
    """A request that got no usable reply; the text says why and never contains the key.

    Args:
        reason: Why.
        status: What the server answered (HTTP); None where it did not refuse.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class _Stopped(BaseException):
    """Ends the library's own attempts, which catch every `Exception`."""


class Endpoint:
    """One server, for as long as a batch of requests takes; any number of threads may ask.

    The log of the HTTP libraries is cut down to warnings, for the whole process: below that they
    log addresses and bodies.

    Args:
        base_url: Where the API lies.
        api_key_env: Name of the environment variable that holds the key; None for no key.
        timeout_s: Longest wait for the server, per attempt (seconds).
        max_attempts: Attempts per request, whatever they fail of (count).
        backoff_s: Longest wait after the first reply that cannot be read (seconds); doubles with
            each. The actual wait is drawn evenly from zero to that.
        max_wait_s: No such wait is longer (seconds).

    Raises:
        ConfigError: If the libraries are not installed, or the variable is not set or holds no key.
    """

    def __init__(
        self,
        base_url: str,
        api_key_env: str | None,
        *,
        timeout_s: float,
        max_attempts: int,
        backoff_s: float,
        max_wait_s: float,
    ) -> None:
        openai, tenacity = _libraries()
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        self._base_url = base_url
        self._api_key_env = api_key_env
        self._key = _NO_KEY if api_key_env is None else _key(api_key_env)
        self._max_attempts = max_attempts
        self._stopped = threading.Event()
        self._openai = openai
        self._client = openai.OpenAI(
            api_key=self._key,
            base_url=base_url,
            timeout=timeout_s,
            http_client=openai.DefaultHttpxClient(event_hooks={"request": [self._require_going]}),
        )
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(UnreadableReplyError),
            wait=tenacity.wait_random_exponential(multiplier=backoff_s, max=max_wait_s),
            sleep=tenacity.sleep_using_event(self._stopped),
            reraise=True,
        )

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def stop(self) -> None:
        """Ends all asking: requests under way are the last.

        A wait of the library runs out: eight seconds, or the two minutes it lets a server ask for.
        """
        self._stopped.set()

    def ask(
        self,
        request: Mapping[str, Any],
        read: Callable[[str], _T],
        formats: Sequence[Mapping[str, Any] | None] = (None,),
    ) -> _T:
        """Returns what `read` makes of the server's reply to a chat completion.

        Args:
            request: Body of the request.
            read: Takes the text of the reply; raises UnreadableReplyError to have it repeated.
            formats: What `response_format` may be, best first (at least one); None leaves it out.
                Where the server refuses one, it is asked for the next, and remembered.

        Raises:
            RequestError: If there is no usable reply after the last attempt, or the server
                refuses the request.
            ConfigError: If the server refuses the key or knows no such model or address: every
                other request would end the same way.
        """
        server = self._base_url, str(request["model"])
        refusal: RequestError | None = None
        known = _taken.get(server, formats[0])
        for form in formats[formats.index(known) if known in formats else 0 :]:
            body = request if form is None else {**request, "response_format": form}
            try:
                reply = self._ask(body, read)
            except RequestError as error:
                refusal = refusal or error
                is_of_format = server not in _taken or _OF_FORMAT.search(str(error))
                if error.status not in _REFUSED or form is None or not is_of_format:
                    break
            else:
                if len(formats) > 1:
                    _taken[server] = form
                return reply
        assert refusal is not None
        raise refusal

    def _ask(self, request: Mapping[str, Any], read: Callable[[str], _T]) -> _T:
        num_attempts = 0

        def ask_once() -> _T:
            nonlocal num_attempts
            # The library repeats what fails on the way: attempts that are left are shared with it.
            client = self._client.with_options(max_retries=self._max_attempts - num_attempts - 1)
            reply = client.chat.completions.with_raw_response.create(**request)
            num_attempts += 1 + reply.retries_taken
            return read(_content(reply.text))

        # `from None` throughout: what the library raises may quote the key.
        openai = self._openai
        retrying = self._retrying.copy(stop=lambda _: num_attempts >= self._max_attempts)
        try:
            return retrying(ask_once)
        except _Stopped:
            raise RequestError("not asked: the run was stopped") from None
        except openai.APIStatusError as error:
            raise self._refused(error, request) from None
        except openai.APITimeoutError:
            raise RequestError("no reply in time") from None
        except openai.APIConnectionError as error:
            cause = f" ({self._safe(error.__cause__)})" if error.__cause__ else ""
            raise RequestError(f"no connection{cause}") from None
        except UnreadableReplyError as error:
            raise RequestError(self._safe(error)) from None

    def _require_going(self, _: object) -> None:
        if self._stopped.is_set():
            raise _Stopped

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
        message = error.message.removeprefix(f"Error code: {status} - ")
        return RequestError(f"HTTP {status}: {self._safe(message)}", status)

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


def _content(reply: str) -> str:
    try:
        choice = json.loads(reply)["choices"][0]
        content, reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UnreadableReplyError("the reply is no chat completion") from None
    if reason == "length":
        # What stands there may be a thought, or a sentence that was to be taken back.
        raise UnreadableReplyError("the reply was cut off; raise LlmJudge.max_tokens")
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

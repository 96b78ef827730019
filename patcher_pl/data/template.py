"""What a tokenizer's chat template does, found out by trying it rather than from the model's name."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from patcher_pl.errors import ConfigError
from patcher_pl.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# For tokenizers that come without a template. The space belongs to the answer, as it does in the
# vocabularies of GPT-2-like tokenizers.
DEFAULT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}
{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' %}
{{ 'User: ' + message['content'] + '\\n' }}
{%- else %}
{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ 'Assistant:' }}
{%- endif %}"""

# Words no template contains; a rendering is searched for them.
_SYSTEM, _QUESTION, _ANSWER = "zqsystemzq", "zqquestionzq", "zqanswerzq"
END_MARK = "zqendzq"


class TemplateError(Exception):
    """The template refused to render these messages; carries the template's own words."""


@dataclass(frozen=True)
class TemplateTraits:
    """How a template behaves.

    Args:
        takes_system: It accepts a system turn and shows it both in prompts and in answered
            conversations. Otherwise the system prompt has to go into the first user turn.
        stop_texts: Tokens that end answers: that of the last one, then that of earlier ones where
            it is another (gpt-oss has `<|return|>` and `<|end|>`).
        ending: What stands between the last answer and its stop token, mostly nothing.
        control: Finds any control token of the tokenizer in a text.
    """

    takes_system: bool
    stop_texts: tuple[str, ...]
    ending: str
    control: re.Pattern[str]


_traits: "WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, TemplateTraits]]" = (
    WeakKeyDictionary()
)


def ensure_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Gives a tokenizer without a chat template the plain default one, to be exported with it.

    Raises:
        ConfigError: If it has no end-of-text token either: nothing could end an answer.
    """
    if tokenizer.chat_template is not None:
        return
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"The tokenizer {tokenizer.name_or_path!r} has no chat template and no end-of-text "
            "token. Set `eos_token` or `chat_template` in its tokenizer_config.json."
        )
    _say_that_there_is_none(tokenizer.name_or_path)
    tokenizer.chat_template = DEFAULT_TEMPLATE


@cache
def _say_that_there_is_none(name: str) -> None:
    """Once per process: a run loads the same tokenizer for data, model and red team."""
    logger.warning(
        "The tokenizer %r has no chat template: conversations are written as `User: ...` and "
        "`Assistant: ...`. Set `chat_template` in its tokenizer_config.json for another form.",
        name,
    )


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Returns the messages in the form that templates read."""
    return [{"role": message.role, "content": message.content} for message in messages]


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    options: Mapping[str, Any],
    *,
    generation_prompt: bool = False,
) -> str:
    """Returns the conversation as text.

    Raises:
        TemplateError: If the template refuses it.
    """
    from jinja2 import TemplateError as JinjaError

    try:
        text = tokenizer.apply_chat_template(
            as_dicts(messages), tokenize=False, add_generation_prompt=generation_prompt, **options
        )
    except (JinjaError, ValueError, TypeError) as error:
        raise TemplateError(str(error) or type(error).__name__) from error
    assert isinstance(text, str)
    return text


def template_traits(
    tokenizer: "PreTrainedTokenizerBase", options: Mapping[str, Any]
) -> TemplateTraits:
    """Renders a few probe conversations and reads off how the template behaves; cached.

    Raises:
        ConfigError: If the template cannot render one question and its answer, or ends answers
            with no control token, so that a model trained on it would never stop.
    """
    ensure_template(tokenizer)
    template = tokenizer.get_chat_template()
    key = repr((template, tokenizer.eos_token, sorted(options.items())))
    known = _traits.setdefault(tokenizer, {})
    if key not in known:
        control = _control_tokens(tokenizer)
        stop, ending = _stop_token(tokenizer, options, control)
        earlier = _earlier_stop_token(tokenizer, options, control, ending)
        known[key] = TemplateTraits(
            takes_system=_takes_system(tokenizer, options),
            stop_texts=tuple(dict.fromkeys([stop, *earlier])),
            ending=ending,
            control=control,
        )
    return known[key]


def _takes_system(tokenizer: "PreTrainedTokenizerBase", options: Mapping[str, Any]) -> bool:
    prompt = [Message("system", _SYSTEM), Message("user", _QUESTION)]
    answered = [*prompt, Message("assistant", _ANSWER)]
    try:
        texts = [
            render(tokenizer, prompt, options, generation_prompt=True),
            render(tokenizer, answered, options),
        ]
    except TemplateError:
        return False
    return all(_SYSTEM in text for text in texts)


def _control_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Matches what is a token of its own whatever stands around it, except for runs of spaces."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values())
    texts = {text for text in (*tokenizer.all_special_tokens, *added) if text.strip()}
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _stop_token(
    tokenizer: "PreTrainedTokenizerBase", options: Mapping[str, Any], control: re.Pattern[str]
) -> tuple[str, str]:
    """The token that ends the last answer, and what the template writes before it."""
    name = tokenizer.name_or_path
    try:
        text = render(
            tokenizer, [Message("user", _QUESTION), Message("assistant", _ANSWER)], options
        )
    except TemplateError as error:
        raise ConfigError(
            f"The chat template of {name!r} cannot render a question and its answer ({error}). "
            "Repair `chat_template` of the tokenizer, or ChatFormat.template_options."
        ) from error
    _, found, ending = text.rpartition(_ANSWER)
    stop = control.search(ending) if found else None
    if stop is None:
        raise ConfigError(
            f"The chat template of {name!r} ends an answer with {ending!r}, which holds no control "
            "token: a model trained on it would never stop. Let the template write `eos_token` after "
            "each answer."
        )
    return stop.group(), ending[: stop.start()]


def _earlier_stop_token(
    tokenizer: "PreTrainedTokenizerBase",
    options: Mapping[str, Any],
    control: re.Pattern[str],
    ending: str,
) -> list[str]:
    """The token that ends an answer after which the conversation goes on, if it can be told."""
    turns = [Message("user", _QUESTION), Message("assistant", _ANSWER)]
    try:
        text = render(tokenizer, [*turns, *turns[:1], Message("assistant", "?")], options)
    except TemplateError:
        return []
    _, found, behind = text.partition(_ANSWER)
    stop = control.search(behind) if found else None
    if stop is None or (behind[: stop.start()].strip() and behind[: stop.start()] != ending):
        return []
    return [stop.group()]

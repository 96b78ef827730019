"""Whether a model has room for the prompts of a red team, found out before anything is attacked."""

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from patcher_pl.errors import DataError
from patcher_pl.evaluation.benchmark import Question
from patcher_pl.models.context import context_length
from patcher_pl.models.language_model import LanguageModel
from patcher_pl.redteam.asking import Asking
from patcher_pl.redteam.red_team import RedTeam

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def require_room(
    team: RedTeam,
    language_model: LanguageModel,
    config: "PretrainedConfig | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> None:
    """Sees to it that every prompt, in the words of every attack, leaves room for an answer.

    How many answers have less room than `Generation.max_new_tokens` is logged.

    Args:
        team: Its prompts, harmful and benign, and attacks with their settings.
        language_model: What is asked; its weights are not loaded.
        config: Its architecture; None loads it.
        tokenizer: Its tokenizer; None loads it.

    Raises:
        DataError: If a prompt leaves no room, or the chat template refuses it; or if prompts cannot
            be read.
        ConfigError: If the model cannot be found.
    """
    context = context_length(config or language_model.load_config())
    if context is None:
        return
    tokenizer, chat = tokenizer or language_model.load_tokenizer(), language_model.chat
    max_new_tokens, num_short, num_prompts = team.generation.max_new_tokens, 0, 0
    for who, wording, harmful, questions in _asked(team):
        prefill = wording.prefill if harmful else ""
        lengths = [
            len(
                chat.prompt_ids(
                    tokenizer, wording.reworded(question.messages, harmful=harmful), prefill
                )
            )
            for question in questions
        ]
        if num_long := sum(length >= context for length in lengths):
            longest = max(range(len(lengths)), key=lengths.__getitem__)
            raise DataError(
                f"{questions[longest].origin}: a prompt of {lengths[longest]} tokens leaves no room for "
                f"an answer: {language_model.path!r} reads at most {context}. So it is with {num_long} "
                f"of {len(lengths)} prompts, as {who} words them. Shorten or drop them."
            )
        num_short += sum(length + max_new_tokens > context for length in lengths)
        num_prompts += len(lengths)
    if num_short:
        logger.warning(
            "%s reads %d tokens, so that %d of %d answers have room for fewer than "
            "Generation.max_new_tokens %d.",
            *(language_model.path, context, num_short, num_prompts, max_new_tokens),
        )


def _asked(team: RedTeam) -> Iterator[tuple[str, Asking, bool, Sequence[Question]]]:
    """Who asks, in which words, whether for harm, and what; each once."""
    harmful = team.prompts.questions()
    benign = team.benign_prompts.questions() if team.benign_prompts else []
    attacks = [cell.attack for cell in team.cells()]
    for wording, name in {attack.wording: attack.name for attack in attacks}.items():
        yield name, wording, True, harmful
    for asking, name in {attack.asking: attack.name for attack in attacks}.items():
        if benign:
            yield name, asking, False, benign

"""Whether a model has an embedding for every token of its tokenizer."""

from typing import TYPE_CHECKING

from patcher_pl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Placeholders of pictures and sounds, which a text model shares with its larger siblings (Gemma 3).
_NO_TEXT = ("image", "audio", "video", "boi", "eoi", "boa", "eoa")


def require_embeddings(
    path: str, tokenizer: "PreTrainedTokenizerBase", config: "PretrainedConfig"
) -> None:
    """Sees to it that no text can become a token that the embedding has no row for.

    Args:
        path: Name of the model, for the message.
        tokenizer: Its tokenizer.
        config: Its architecture; one without `vocab_size` is passed over.

    Raises:
        ConfigError: If there is such a token.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(rows, int):
        return
    vocabulary = tokenizer.get_vocab()
    beyond = {token for token, place in vocabulary.items() if place >= rows}
    if not beyond - _placeholders(tokenizer):
        return
    first = min(beyond, key=vocabulary.__getitem__)
    raise ConfigError(
        f"LanguageModel.path: the tokenizer of {path!r} has {1 + max(vocabulary.values())} tokens, the "
        f"embedding of the model {rows} rows (vocab_size): none for {first!r}, and {len(beyond)} in "
        "all. Load them in transformers, call model.resize_token_embeddings(len(tokenizer)), train "
        "the new rows, and save both; or give the tokenizer that belongs to the model."
    )


def _placeholders(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    named = tokenizer.special_tokens_map
    return {
        str(token)
        for name, token in named.items()
        if name.removesuffix("_token").startswith(_NO_TEXT)
    }

"""PEFT adapters that come with a model: what they stand upon, and how they are merged into it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patcher_pl.errors import ConfigError, first_line
from patcher_pl.shipped import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What decoders of transformers call their input embedding.
_EMBEDDINGS = (".embed_tokens", ".wte", ".embed_in", ".word_embeddings", ".embeddings")


@dataclass(frozen=True)
class Checkpoint:
    """A directory, or a repository of the hub.

    Args:
        location: Its path, or hub id.
        revision: Branch, tag or commit on the hub.
    """

    location: str
    revision: str | None = None


@dataclass(frozen=True)
class Parts:
    """What a model is put together from.

    Args:
        base: Whole weights.
        adapters: What is merged into them, in this order; mostly none.
    """

    base: Checkpoint
    adapters: tuple[Checkpoint, ...] = ()

    @property
    def all(self) -> tuple[Checkpoint, ...]:
        """All of these, the base first."""
        return (self.base, *self.adapters)

    @property
    def tokenizer(self) -> Checkpoint:
        """Where the tokenizer lies: with the last adapter that has one, or with the base."""
        return next(
            (adapter for adapter in reversed(self.adapters) if _has_tokenizer(adapter)), self.base
        )

    def merged(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """Returns the base's model with the adapters merged into its weights, in checkpoint.

        Raises:
            ConfigError: If an adapter does not fit, or is of a kind that cannot be merged.
        """
        for adapter in self.adapters:
            model = _merge(model, adapter)
        return model

    def num_embeddings(self) -> int | None:
        """Rows of the embedding that an adapter brings along; None where the base's stays."""
        found = [rows for adapter in self.adapters if (rows := _num_embeddings(adapter))]
        return found[-1] if found else None


def parts_of(checkpoint: Checkpoint) -> Parts:
    """Finds out whether a model is whole or an adapter, which may stand upon another one.

    Raises:
        ConfigError: If an adapter names no base, stands upon itself, or lies beside whole weights.
    """
    adapters: list[Checkpoint] = []
    while (config := _adapter_config(checkpoint)) is not None:
        if checkpoint in adapters:
            raise ConfigError(
                f"LanguageModel.path: the adapter in {checkpoint.location!r} stands upon itself. "
                f"Set base_model_name_or_path in its {_CONFIG} to the model that it was trained on."
            )
        _refuse_whole_weights(checkpoint.location)
        adapters.append(checkpoint)
        checkpoint = _base_of(checkpoint.location, config)
    return Parts(checkpoint, tuple(reversed(adapters)))


def _adapter_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The adapter's own configuration; None where there is no adapter."""
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        file = find_adapter_config_file(checkpoint.location, revision=checkpoint.revision)
    except (OSError, ValueError):
        return None  # Whoever loads the model says what is wrong with such a checkpoint.
    if file is None:
        return None
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: this is not JSON ({first_line(error)}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("base_model_name_or_path"), str):
        raise ConfigError(
            f"{file} must name the model that the adapter was trained on, "
            "base_model_name_or_path, got none. Set it to a hub id or a directory."
        )
    return content


def _base_of(location: str, config: dict[str, Any]) -> Checkpoint:
    name = config["base_model_name_or_path"]
    beside = Path(location) / name
    if not Path(name).is_dir() and beside.is_dir():
        return Checkpoint(str(beside))
    return Checkpoint(resolve_model(name), config.get("revision"))


def _refuse_whole_weights(location: str) -> None:
    whole = [file.name for file in Path(location).glob("*.safetensors") if file.name != _WEIGHTS]
    if Path(location).is_dir() and whole:
        raise ConfigError(
            f"LanguageModel.path: {location!r} holds both an adapter ({_CONFIG}) and whole weights "
            f"({min(whole)}), which may or may not have it merged already. Move one of them away."
        )


def _has_tokenizer(checkpoint: Checkpoint) -> bool:
    from transformers.utils.hub import cached_file

    file = cached_file(
        checkpoint.location,
        "tokenizer_config.json",
        revision=checkpoint.revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return file is not None


def _weights_file(adapter: Checkpoint) -> str:
    from transformers.utils.hub import cached_file

    try:
        file = cached_file(adapter.location, _WEIGHTS, revision=adapter.revision)
    except OSError as error:
        raise ConfigError(
            f"LanguageModel.path: the weights of the adapter in {adapter.location!r} could not be "
            f"loaded ({first_line(error)}). It must hold {_WEIGHTS}; pickled weights are not read."
        ) from error
    assert file is not None
    return file


def _num_embeddings(adapter: Checkpoint) -> int | None:
    """Rows of the input embedding that is saved with an adapter, if it is."""
    from safetensors import safe_open

    with safe_open(_weights_file(adapter), framework="pt") as file:
        # As peft names it where the vocabulary had grown before the adapter was trained.
        names = [
            name
            for name in file.keys()  # noqa: SIM118  # no mapping
            if name.removesuffix(".weight").removesuffix(".base_layer").endswith(_EMBEDDINGS)
        ]
        return file.get_slice(names[0]).get_shape()[0] if names else None


def _merge(model: "PreTrainedModel", adapter: Checkpoint) -> Any:
    from peft import PeftConfig, get_peft_model

    where = f"LanguageModel.path: the adapter in {adapter.location!r}"
    _weights_file(adapter)  # Or peft would look for pickled ones.
    try:
        config = PeftConfig.from_pretrained(adapter.location, revision=adapter.revision)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{where} has no usable {_CONFIG} ({first_line(error)}).") from error
    if config.is_prompt_learning or config.task_type not in (None, "CAUSAL_LM"):
        raise ConfigError(
            f"{where} is of a kind that cannot be merged into the weights of a causal language model "
            f"({config.peft_type}, task_type {config.task_type}). Give a merged model instead."
        )
    rows = _num_embeddings(adapter)
    if rows is not None and rows != model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(rows)
    config.base_model_name_or_path = model.name_or_path  # Found above, under whatever name.
    try:
        adapted: Any = get_peft_model(model, config)
        loaded = adapted.load_adapter(
            adapter.location, "default", revision=adapter.revision, torch_device="cpu"
        )
        lost = [*loaded.missing_keys, *loaded.unexpected_keys]
        if lost:
            raise ValueError(f"{len(lost)} tensors have no counterpart, {lost[0]!r} first")
        plain = adapted.merge_and_unload(safe_merge=True)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"{where} does not fit the model that it names, {model.name_or_path!r} "
            f"({first_line(error)}). Correct base_model_name_or_path in its {_CONFIG}."
        ) from error
    # Peft freezes what it adapts; a loaded model is trainable.
    return plain.requires_grad_(True)

"""A model's architecture without its weights."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from patcher_pl.errors import ConfigError
from patcher_pl.models import LanguageModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def find_architecture(
    language_model: LanguageModel, given: Path | None, neighbors: Sequence[Path]
) -> "PretrainedConfig":
    """Reads the architecture of a model, from the first of these that exists.

    1. the file that was given;
    2. `config.json` in the model's directory;
    3. `config.json` beside a configuration of the run, if its `_name_or_path` is the model's path;
    4. the hub, or what is cached of it.

    Args:
        language_model: Whose architecture is wanted.
        given: A `config.json` of transformers, under any name; None where none was given.
        neighbors: Directories of the run's configuration files.

    Raises:
        ConfigError: If there is none.
    """
    from transformers import AutoConfig

    path = language_model.path
    if given is not None and not given.is_file():
        raise ConfigError(f"--model_config: there is no file {given}.")
    own, beside = Path(path) / "config.json", [folder / "config.json" for folder in neighbors]
    places = [own, *(p for p in beside if _is_of(p, path))] if given is None else [given]
    for place in places:
        if place.is_file():
            try:
                return AutoConfig.from_pretrained(place)
            except (OSError, ValueError, KeyError) as error:
                raise ConfigError(
                    f"{place}: no model configuration of transformers ({error})."
                ) from error
    try:
        return AutoConfig.from_pretrained(
            path,
            revision=language_model.revision,
            trust_remote_code=language_model.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"LanguageModel.path: the architecture of {path!r} is neither on this disk nor could it "
            "be fetched from the hub. Give the model's config.json with --model_config, or put it "
            f'beside the configuration with `"_name_or_path": "{path}"` in it.'
        ) from error


def _is_of(place: Path, path: str) -> bool:
    content = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else None
    return isinstance(content, dict) and content.get("_name_or_path") == path


@dataclass(frozen=True, kw_only=True)
class UnloadedModel(LanguageModel):
    """A language model that is built from its architecture alone, without weights to load.

    Args:
        architecture: As in the model's config.json.
    """

    architecture: "PretrainedConfig"

    @classmethod
    def of(
        cls, language_model: LanguageModel, architecture: "PretrainedConfig", **changes: Any
    ) -> "UnloadedModel":
        """Returns the same model but for `changes`, to be built from `architecture`."""
        given = {
            field.name: getattr(language_model, field.name) for field in fields(language_model)
        }
        # The kernels of `flash_attention_2` need values; `sdpa` keeps as much for the way back.
        if given["attn_implementation"] not in (None, "sdpa", "eager"):
            given["attn_implementation"] = "sdpa"
        given |= {"compile": False, "liger": False, **changes}
        return cls(**given, architecture=architecture)

    def load_model(self) -> "PreTrainedModel":
        """Builds the model; under fake tensors this takes no memory."""
        from transformers import AutoModelForCausalLM

        name = self.attn_implementation
        options = {} if name is None else {"attn_implementation": name}
        model = AutoModelForCausalLM.from_config(
            self.architecture, dtype=getattr(torch, self.dtype), **options
        )
        return self.adapted(model.eval())

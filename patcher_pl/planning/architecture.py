"""A model's architecture without its weights."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from patcher_pl.errors import ConfigError
from patcher_pl.models import LanguageModel, Lora
from patcher_pl.shipped import resolve_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def find_architecture(
    model: LanguageModel, given: Path | None, neighbors: Sequence[Path]
) -> "PretrainedConfig":
    """Reads the architecture of a model, from the first of these that exists.

    1. the file that was given;
    2. `config.json` in the model's directory, or in that of the model under an adapter;
    3. `config.json` in a directory of the run's configuration files (`neighbors`), if its
       `_name_or_path` is the model's path;
    4. the hub, or what is cached of it.

    Raises:
        ConfigError: If there is none.
    """
    from transformers import AutoConfig

    if given is not None and not given.is_file():
        raise ConfigError(f"--model_config: there is no file {given}.")
    # Nothing is asked of the hub before the files at hand.
    parts = model.parts if Path(resolve_model(model.path)).is_dir() else None
    base = model.path if parts is None else parts.base.location
    beside = [folder / "config.json" for folder in neighbors]
    own = [Path(base) / "config.json", *(file for file in beside if _is_of(file, base))]
    # What a GGUF file says holds, whatever lies beside it.
    found = None if model.gguf_file else next((file for file in own if file.is_file()), None)
    place = given or found
    try:
        if place is None:
            return model.load_config()
        config = AutoConfig.from_pretrained(
            place, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        if parts is not None and (rows := parts.num_embeddings()) is not None:
            config.get_text_config().vocab_size = rows
        return config
    except (OSError, ValueError, KeyError, ConfigError) as error:
        if place is not None:
            raise ConfigError(
                f"{place}: no model configuration of transformers ({error})."
            ) from error
        raise ConfigError(
            f"LanguageModel.path: the architecture of {model.path!r} is neither on this disk nor "
            "could it be fetched from the hub. Give the model's config.json with --model_config, or "
            f'put it beside the configuration with `"_name_or_path": "{model.path}"` in it.'
        ) from error


def _is_of(file: Path, path: str) -> bool:
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return isinstance(content, dict) and content.get("_name_or_path") == path


@dataclass(frozen=True, kw_only=True)
class UnloadedLora(Lora):
    """Adapters for a model under fake tensors, which peft cannot make there."""

    def attach(self, model: "PreTrainedModel") -> Any:
        """See `Lora.attach`."""
        # Torch swaps what `Module.to` changes, and a fake tensor that is watched cannot be swapped.
        with unset_fake_temporarily():
            adapted = super().attach(model)
        for module in adapted.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not isinstance(parameter, FakeTensor):
                    made = torch.empty_like(parameter)
                    module._parameters[name] = nn.Parameter(made, parameter.requires_grad)
        return adapted


@dataclass(frozen=True, kw_only=True)
class UnloadedModel(LanguageModel):
    """A language model that is built from its architecture alone, without weights to load."""

    architecture: "PretrainedConfig"

    def load_config(self) -> "PretrainedConfig":
        return self.architecture

    def load_model(self) -> "PreTrainedModel":
        """Builds the model; under fake tensors this takes no memory."""
        from transformers import AutoModelForCausalLM

        name, options = self.attn_implementation, {}
        if name is not None:
            # The kernels of `flash_attention_2` need values; `sdpa` keeps as much for the way back.
            options["attn_implementation"] = "eager" if name == "eager" else "sdpa"
        model = AutoModelForCausalLM.from_config(
            self.architecture, dtype=getattr(torch, self.dtype), **options
        )
        lora = self.lora and UnloadedLora(**vars(self.lora))
        return replace(self, lora=lora).adapted(model.eval())

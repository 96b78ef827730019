"""Which Hugging Face model to load, how, and how to talk to it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from patcher_pl.contents import model_digest
from patcher_pl.data.chat import ChatFormat
from patcher_pl.errors import ConfigError, first_line
from patcher_pl.files import write_atomically
from patcher_pl.models import packed_attention
from patcher_pl.models.acceleration import accelerated
from patcher_pl.models.lora import Lora, merged_copy
from patcher_pl.models.sharding import Sharding
from patcher_pl.models.weights import Place
from patcher_pl.shipped import resolve_model
from patcher_pl.validation import require

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DtypeName = Literal["float32", "bfloat16", "float64"]


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A causal language model on the hub or on disk; loads nothing until asked.

    Args:
        path: Hub id, local directory, or `testbed` (ships with this package).
        chat: How conversations become tokens; training, attacks and generation share it.
        dtype: Number format of the weights.
        attn_implementation: Attention of transformers (`sdpa`, `eager`, `flash_attention_2`, ...), or
            `packed_sdpa`: `sdpa`, but conversations of packed batches one at a time. None takes the
            model's default.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Compile the model with torch (`dynamic`: batches differ in length). On one device,
            for gradients that are taken once.
        liger: Take Liger's Triton kernels for norms, rotations and MLPs, on GPUs; needs
            `patcher-pl[gpu]`. For gradients that are taken once.
        lora: Train low-rank adapters only; None trains every parameter.
        sharding: How the model is spread where the trainer's strategy shards it.
        weight_copies_on: Where attack vector and saved weights are kept: beside the `model`, or in
            `host` memory, which costs two copies over the bus per shift and saves their space.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that comes with the checkpoint. Off: it could do anything.

    Raises:
        ConfigError: When loading, if there is no such model, it is no causal LM, or `liger` cannot
            be had.
    """

    path: str
    chat: ChatFormat = field(default_factory=ChatFormat)
    dtype: DtypeName = "float32"
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    liger: bool = False
    lora: Lora | None = None
    sharding: Sharding = field(default_factory=Sharding)
    weight_copies_on: Place = "model"
    revision: str | None = None
    trust_remote_code: bool = False

    def load_model(self) -> "PreTrainedModel":
        """Loads the weights (safetensors only), in evaluation mode, adapters attached."""
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(
                self._location, use_safetensors=True, **self._hub_options, **self._model_options
            )
        except (OSError, ValueError, ImportError) as error:
            raise self._loading_failed("model", error) from error
        return accelerated(self.adapted(model), compile_=self.compile, liger=self.liger)

    def adapted(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """Switches checkpointing on and attaches adapters, as far as asked for."""
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable()
        return model if self.lora is None else self.lora.attach(model).eval()

    def load_sharded(self, mesh: "DeviceMesh") -> "PreTrainedModel":
        """Loads the weights once and spreads them over the processes of `mesh`, as `sharding` says.

        Raises:
            ValueError: If there is `lora`: its weights are few enough not to be sharded.
        """
        remedy = "Train every weight, or train adapters on one device."
        require(self, self.lora is None, "lora", "null for a sharded model", remedy)
        return self.sharding.load(self.load_model, self._make_empty, mesh)

    def _make_empty(self) -> "PreTrainedModel":
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(self._location, **self._hub_options)
        except (OSError, ValueError, ImportError) as error:
            raise self._loading_failed("config", error) from error
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=self.trust_remote_code, **self._model_options
            )
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable()
        return accelerated(model, compile_=False, liger=self.liger)

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Loads the tokenizer, with a pad token (the end-of-text token where there is none)."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self._location, **self._hub_options)
        except (OSError, ValueError, ImportError) as error:
            raise self._loading_failed("tokenizer", error) from error
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise ConfigError(
                    f"The tokenizer of {self.path!r} has neither a pad nor an end-of-text token. "
                    "Set one and save the tokenizer into the model directory."
                )
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def contents(self) -> Mapping[str, str]:
        """See `NamesContents`: weights, configuration, tokenizer and template, wherever they lie."""
        digest = model_digest(self._location, self.revision)
        return {} if digest is None else {"path": digest}

    def module_name(self) -> str:
        """The module in which transformers defines this kind of model; to import it ahead of time."""
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        try:
            config = AutoConfig.from_pretrained(self._location, **self._hub_options)
        except (OSError, ValueError) as error:
            raise self._loading_failed("configuration", error) from error
        kind = type(config)
        return MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, kind).__module__

    @property
    def _location(self) -> str:
        return resolve_model(self.path)

    @property
    def _hub_options(self) -> dict[str, str | bool | None]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @property
    def _model_options(self) -> dict[str, Any]:
        import torch

        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype)}
        if self.attn_implementation is not None:
            if self.attn_implementation == packed_attention.NAME:
                packed_attention.register()
            options["attn_implementation"] = self.attn_implementation
        return options

    def _loading_failed(self, part: str, error: Exception) -> ConfigError:
        return ConfigError(
            f"LanguageModel.path: the {part} of {self.path!r} could not be loaded "
            f"({first_line(error)}). Give a hub id, `testbed`, or a directory that holds config.json, *.safetensors and "
            "tokenizer files."
        )


def export_model(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", directory: Path
) -> None:
    """Writes a plain Hugging Face directory: safetensors, tokenizer and chat template.

    Adapters are merged into a copy of the weights, so that anyone can load the result with
    `AutoModelForCausalLM.from_pretrained`. The directory appears whole or not at all.
    """
    from peft import PeftModel

    def write(temporary: Path) -> None:
        plain = merged_copy(model) if isinstance(model, PeftModel) else model
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)

    write_atomically(directory, write)

"""Which Hugging Face model to load, how, and how to talk to it."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from patcher_pl.contents import model_digest
from patcher_pl.data.chat import ChatFormat
from patcher_pl.data.template import ensure_template
from patcher_pl.errors import ConfigError, first_line
from patcher_pl.files import write_atomically
from patcher_pl.models import packed_attention
from patcher_pl.models.acceleration import accelerated
from patcher_pl.models.adapters import Checkpoint, Parts, parts_of
from patcher_pl.models.context import context_length
from patcher_pl.models.lora import Lora, merged_copy
from patcher_pl.models.sharding import Sharding
from patcher_pl.models.vocabulary import require_embeddings
from patcher_pl.models.weights import Place
from patcher_pl.randomness import seeded
from patcher_pl.reports.settings import NO_OUTCOME
from patcher_pl.shipped import resolve_model

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DtypeName = Literal["float32", "bfloat16", "float64"]


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A causal language model on the hub or on disk; loads nothing until asked.

    A PEFT adapter is a model like others: it is merged into the model that it names when it is
    loaded, once, so that everything sees one set of plain weights.

    Args:
        path: Hub id, local directory, or `testbed` (ships with this package); of whole weights, or of
            a PEFT adapter.
        chat: How conversations become tokens; training, attacks and generation share it.
        dtype: Number format of the weights. In bfloat16, what is trained has copies in float32 beside
            it (12 bytes per weight with Adam, not 4), or its steps would be lost to rounding.
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
        from_scratch_seed: Seed of fresh weights, as the architecture initializes them, in the place of
            those of `path`, from which tokenizer and architecture are. None loads the weights.
        gguf_file: Name of a GGUF file in `path` to take weights and tokenizer from, converted to
            `dtype`; needs `patcher-pl[gguf]`. What is exported is in safetensors.

    Raises:
        ConfigError: When loading, if there is no such model, it is no causal LM, its tokenizer has
            tokens without an embedding, or `liger` cannot be had.
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
    gguf_file: str | None = None
    # See `contents`: digests of models that are loaded do not depend on it.
    from_scratch_seed: int | None = field(default=None, metadata=NO_OUTCOME)

    def load_model(self) -> "PreTrainedModel":
        """Loads (or makes) the weights, in evaluation mode, adapters attached."""
        model = self._load_weights() if self.from_scratch_seed is None else self._fresh_model()
        return accelerated(self.adapted(model), compile_=self.compile, liger=self.liger)

    def _fresh_model(self) -> "PreTrainedModel":
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        assert self.from_scratch_seed is not None
        with seeded(self.from_scratch_seed, torch.device("cpu")):
            model = AutoModelForCausalLM.from_config(
                self.load_config(), trust_remote_code=self.trust_remote_code, **self._model_options
            )
        base = self.parts.base
        with suppress(OSError):  # Without one, the architecture's stays.
            found = GenerationConfig.from_pretrained(
                base.location, revision=base.revision or "main"
            )
            model.generation_config = found
        return model.eval()

    def _load_weights(self) -> "PreTrainedModel":
        """Loads them (safetensors or GGUF), adapters that come with the model merged."""
        from transformers import AutoModelForCausalLM, GgufConfig

        parts = self.parts
        options = {**self._options_of(parts.base), **self._model_options}
        if self.gguf_file is None:
            options["use_safetensors"] = True
        else:
            # Or some architectures would stay packed, and could be neither trained nor saved.
            options["quantization_config"] = GgufConfig(dequantize=True)
        try:
            model = AutoModelForCausalLM.from_pretrained(parts.base.location, **options)
        except (OSError, ValueError, ImportError, RuntimeError) as error:  # The last: sizes differ.
            raise self._loading_failed("model", error) from error
        return parts.merged(model)

    def adapted(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """Switches checkpointing on and attaches adapters, as far as asked for."""
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable()
        return model if self.lora is None else self.lora.attach(model).eval()

    def load_sharded(self, mesh: "DeviceMesh") -> "PreTrainedModel":
        """Loads the weights once and spreads them over the processes of `mesh`, as `sharding` says.

        Adapters are spread like the weights that they belong to.
        """
        return self.sharding.load(self.load_model, self._make_empty, mesh)

    def _make_empty(self) -> "PreTrainedModel":
        import torch
        from transformers import AutoModelForCausalLM

        config = self.load_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=self.trust_remote_code, **self._model_options
            )
        return accelerated(self.adapted(model), compile_=False, liger=self.liger)

    def load_config(self) -> "PretrainedConfig":
        """Loads the architecture."""
        from transformers import AutoConfig

        parts = self.parts
        try:
            config = AutoConfig.from_pretrained(parts.base.location, **self._options_of(parts.base))
        except (OSError, ValueError, ImportError) as error:
            raise self._loading_failed("configuration", error) from error
        num_embeddings = parts.num_embeddings()
        if num_embeddings is not None:
            config.get_text_config().vocab_size = num_embeddings
        return config

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Loads the tokenizer, with a pad token (the end-of-text token where there is none)."""
        from transformers import AutoTokenizer

        found = self.parts.tokenizer
        try:
            tokenizer = AutoTokenizer.from_pretrained(found.location, **self._options_of(found))
        except (OSError, ValueError, ImportError) as error:
            raise self._loading_failed("tokenizer", error) from error
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise ConfigError(
                    f"The tokenizer of {self.path!r} has neither a pad nor an end-of-text token. "
                    "Set one and save the tokenizer into the model directory."
                )
            tokenizer.pad_token = tokenizer.eos_token
        require_embeddings(self.path, tokenizer, self.load_config())
        ensure_template(tokenizer)
        return tokenizer

    def contents(self) -> Mapping[str, str]:
        """See `NamesContents`: weights, configuration, tokenizer and template, wherever they lie."""
        digests = [model_digest(part.location, part.revision) for part in self.parts.all]
        known = [digest for digest in digests if digest is not None]
        contents = {"path": " ".join(known)} if len(known) == len(digests) else {}
        if self.from_scratch_seed is not None:
            contents["from_scratch_seed"] = str(self.from_scratch_seed)
        return contents

    def load_chat(self) -> ChatFormat:
        """Returns `chat`, with conversations no longer than what the model reads."""
        return self.chat.within(context_length(self.load_config()))

    def module_name(self) -> str:
        """The module in which transformers defines this kind of model; to import it ahead of time."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        kind = type(self.load_config())
        return MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, kind).__module__

    @property
    def parts(self) -> Parts:
        """Where weights, adapters and tokenizer lie; what a digest of the model has to look at."""
        return parts_of(Checkpoint(resolve_model(self.path), self.revision))

    def _options_of(self, checkpoint: Checkpoint) -> dict[str, Any]:
        options: dict[str, Any] = {
            "revision": checkpoint.revision,
            "trust_remote_code": self.trust_remote_code,
        }
        if self.gguf_file is not None and checkpoint == self.parts.base:
            options["gguf_file"] = self.gguf_file
        return options

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
            f"({first_line(error)}). Give a hub id, `testbed`, or a directory that holds config.json, "
            "*.safetensors and tokenizer files, or a PEFT adapter whose base can be loaded. For a "
            "GGUF file, give its directory, LanguageModel.gguf_file, and install `patcher-pl[gguf]`."
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

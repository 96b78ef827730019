"""Two releases of one architecture, weight by weight."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from patcher_pl.errors import ConfigError
from patcher_pl.models.sharding import Sharding

if TYPE_CHECKING:
    from patcher_pl.models.language_model import LanguageModel
    from patcher_pl.models.weights import Weights


def start_of(language_model: "LanguageModel") -> "LanguageModel":
    """The model that training began with: as it is loaded, without adapters and what speeds it up."""
    return replace(
        language_model,
        lora=None,
        compile=False,
        liger=False,
        gradient_checkpointing=False,
        sharding=Sharding(),
    )


def release_at(path: str, language_model: "LanguageModel") -> "LanguageModel":
    """Another release, in the number format of a model, in safetensors."""
    start = start_of(language_model)
    return replace(start, path=path, revision=None, gguf_file=None, from_scratch_seed=None)


def weights_of(release: "LanguageModel", weights: "Weights", setting: str) -> Mapping[str, Tensor]:
    """Loads the weights of another release into host memory, on every process that asks.

    Args:
        release: What to load.
        weights: Those of the model that it is compared with; only shapes are read.
        setting: What named it, for the error.

    Raises:
        ConfigError: If a weight of the model is missing there, or has another shape.
    """
    model: Any = release.load_model()
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, own in zip(weights.names, weights.parameters, strict=True):
        other = found.get(name)
        if other is None or other.shape != own.shape:
            shape = "nothing" if other is None else f"{list(other.shape)}"
            raise ConfigError(
                f"{setting}: {release.path!r} has {shape} where the model has {name} of "
                f"{list(own.shape)}. Name a release of the same architecture and vocabulary."
            )
    return found

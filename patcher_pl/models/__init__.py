"""Loading, adapting, shifting and exporting Hugging Face causal language models."""

from patcher_pl.models.language_model import LanguageModel, export_model
from patcher_pl.models.lora import Lora, merged_copy
from patcher_pl.models.sharding import Sharding
from patcher_pl.models.weights import Weights

__all__ = ["LanguageModel", "Lora", "Sharding", "Weights", "export_model", "merged_copy"]

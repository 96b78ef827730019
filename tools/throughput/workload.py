"""What is measured on: model shapes with random weights and conversations as long as instruction data, or the user's own."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from patcher_pl.data import Source, encode_all
from patcher_pl.data.chat import Encoded
from patcher_pl.models import LanguageModel
from patcher_pl.types import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PAD_ID = 0
END_ID = 1


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Qwen2 architecture, by the names of its Hugging Face configuration."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool = True

    def config(self) -> "PretrainedConfig":
        """Returns the configuration of transformers."""
        from transformers import Qwen2Config

        return Qwen2Config(
            **vars(self),
            max_position_embeddings=2048,
            pad_token_id=PAD_ID,
            eos_token_id=END_ID,
        )

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> "PreTrainedModel":
        """Returns a model with random weights in training mode."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(self.config(), dtype=dtype).train()


@dataclass(frozen=True)
class OwnWork:
    """A model and conversations of the user's.

    Args:
        model: Directory, hub id, or what else `language_model.path` takes.
        rows: What `path` of a source of data takes.
    """

    model: str
    rows: str

    @cached_property
    def _loaded(self) -> LanguageModel:
        return LanguageModel(path=self.model)

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Its tokenizer."""
        return self._loaded.load_tokenizer()

    def config(self) -> "PretrainedConfig":
        """The configuration of transformers."""
        return self._loaded.load_config()

    def build(self, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
        """Returns the model in training mode."""
        return self._loaded.load_model().to(dtype).train()  # type: ignore[call-overload]

    def conversations(self) -> list[Encoded]:
        """The rows as training sees them."""
        return encode_all(self.tokenizer, self._loaded.load_chat(), Source(path=self.rows).load())


# The proportions of Qwen2.5-1.5B on a laptop's scale.
MINIATURE = Shape(
    vocab_size=32768,
    hidden_size=256,
    intermediate_size=1408,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
# https://huggingface.co/Qwen/Qwen2.5-1.5B-Instruct/blob/main/config.json
QWEN_1_5B = Shape(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
)

# https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/config.json
QWEN_7B = Shape(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
# https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct/blob/main/config.json (a Llama).
SMOLLM2_135M = Shape(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
)

# For tests of the benchmark itself.
TINY = Shape(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)

SHAPES = {
    "miniature": MINIATURE,
    "smollm2-135m": SMOLLM2_135M,
    "qwen2.5-1.5b": QWEN_1_5B,
    "qwen2.5-7b": QWEN_7B,
    "tiny": TINY,
}


def answer_lengths(num: int, seed: int) -> list[int]:
    """Answer tokens per conversation: log-normal, median 60, a tail that is cut at 512."""
    return _log_normal(num, seed, median=60, spread=1.0, smallest=4, largest=512)


def prompt_lengths(num: int, seed: int) -> list[int]:
    """Prompt tokens per conversation, template included: log-normal, median 40, 12 to 192."""
    return _log_normal(num, seed, median=40, spread=0.6, smallest=12, largest=192)


def conversations(num: int, shape: Shape, seed: int = 0) -> list[Encoded]:
    """Random tokens, labels on the answer only; every answer ends with the stop token."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for prompt, answer in zip(
        prompt_lengths(num, seed + 1), answer_lengths(num, seed + 2), strict=True
    ):
        size = (prompt + answer,)
        ids = torch.randint(2, shape.vocab_size, size, generator=generator).tolist()
        ids[-1] = END_ID
        made.append(Encoded(ids, [IGNORE_INDEX] * prompt + ids[prompt:]))
    return made


def _log_normal(
    num: int, seed: int, *, median: float, spread: float, smallest: int, largest: int
) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    drawn = median * torch.exp(spread * torch.randn(num, generator=generator))
    return drawn.round().long().clamp(smallest, largest).tolist()

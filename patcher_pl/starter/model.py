"""What can be told about a model before its weights are loaded, and what follows for its settings."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from patcher_pl.data import ChatFormat
from patcher_pl.data.collate import encode_all
from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.models import LanguageModel
from patcher_pl.models.context import context_length
from patcher_pl.models.packing import require_packing
from patcher_pl.randomness import seeded
from patcher_pl.types import IGNORE_INDEX, Conversation

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Weights below which one CPU thread is the fastest, and from which activations and bfloat16 matter (count).
TINY, LARGE = 5e6, 1e9
# Rows that tell enough about lengths (count).
_SAMPLE = 500
# Longest conversation, and longest answer of a measurement, in the Patcher paper (tokens).
_MAX_LENGTH, _MAX_NEW_TOKENS = 1024, 256
# Enough of the architecture to see how it treats packed rows, whatever its size.
_NUM_LAYERS, _WIDTH, _VOCABULARY = 2, 64, 128


@dataclass(frozen=True)
class ModelFacts:
    """A model, by its configuration alone.

    Args:
        name: Class of the model.
        num_parameters: Weights (count).
        packs: Whether packed conversations are kept apart; False also where that cannot be told.
        context: Longest sequence it reads (tokens); None where it does not say.
    """

    name: str
    num_parameters: int
    packs: bool
    context: int | None

    @classmethod
    def of(cls, model: LanguageModel) -> "ModelFacts":
        """Reads the configuration; loads no weights.

        Raises:
            ConfigError: If there is none, or it is none of a causal language model.
        """
        from transformers import AutoModelForCausalLM

        config = model.load_config()
        try:
            with torch.device("meta"):
                whole = AutoModelForCausalLM.from_config(config)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"--model: {model.path} is no causal language model of transformers ({error})."
            ) from error
        return cls(
            name=type(whole).__name__,
            num_parameters=sum(weight.numel() for weight in whole.parameters()),
            packs=_packs(config),
            context=context_length(config),
        )

    @property
    def num_threads(self) -> int | None:
        """CPU threads; None leaves them to torch."""
        return 1 if self.num_parameters < TINY else None

    @property
    def precision(self) -> str:
        """Of Lightning's Trainer."""
        return "bf16-mixed" if self.is_large else "32-true"

    @property
    def is_large(self) -> bool:
        """Whether activations are worth recomputing."""
        return self.num_parameters >= LARGE


def lengths(
    model: LanguageModel, rows: Sequence[Conversation], context: int | None
) -> tuple[int, int]:
    """Longest conversation and longest answer to allow (tokens): those of the data, up to the paper's.

    Args:
        model: Its tokenizer counts.
        rows: A sample of them is looked at.
        context: What the model reads (tokens); None for no limit.

    Raises:
        ConfigError: If there is no tokenizer, or its chat template cannot be used.
        DataError: If the template refuses a row; names it.
    """
    every = -(-len(rows) // _SAMPLE)
    # Nothing is cut here: what is longer than it may be is counted, and reported by `fit`.
    chat = ChatFormat(max_length=2**31)
    encoded = encode_all(model.load_tokenizer(), chat, rows[::every])
    longest = max(len(row.input_ids) for row in encoded)
    answer = max(sum(label != IGNORE_INDEX for label in row.labels) for row in encoded)
    length = min(_MAX_LENGTH, _rounded_up(longest, 64))
    return min(length, context or length), min(_MAX_NEW_TOKENS, _rounded_up(answer, 16))


def _rounded_up(count: int, step: int) -> int:
    return -(-count // step) * step


def _packs(config: "PretrainedConfig") -> bool:
    """Asks a narrow model of the same architecture with random weights."""
    from transformers import AutoModelForCausalLM

    conversations = [list(range(3, 40)), list(range(50, 90))]
    try:
        with seeded(0, torch.device("cpu")):
            model = AutoModelForCausalLM.from_config(_narrow(config)).eval()
        require_packing(model, conversations, torch.device("cpu"), "data.packing")
    # A narrow model that cannot be built, or runs into an error of its own, tells nothing.
    except (PatcherError, ValueError, TypeError, AttributeError, IndexError, RuntimeError, AssertionError):  # fmt: skip
        return False
    return True


def _narrow(config: "PretrainedConfig") -> "PretrainedConfig":
    narrow = deepcopy(config)
    text = narrow.get_text_config()
    text.num_hidden_layers = min(_NUM_LAYERS, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    for name in ("intermediate_size", "moe_intermediate_size"):
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, _WIDTH)
    text.vocab_size = _VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    return narrow

"""The interface of a utility measure."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from patcher_pl.data.chat import ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class UtilityMeasure(ABC):
    """Measures what a model is good for, with numbers of its own choosing.

    Args:
        label: Name in results; None takes the measure's own.
    """

    label: str | None = None

    @property
    def name(self) -> str:
        """Short name that tells this measure from the others of a red team."""
        return self.label or self.default_name

    @property
    @abstractmethod
    def default_name(self) -> str:
        """The name without a label, such as `perplexity`."""

    @abstractmethod
    def prepare(self) -> None:
        """Reads what `measure` needs, so that a wrong path is heard of before the first attack.

        Raises:
            DataError: If data cannot be used.
            ConfigError: If a library or a task is missing.
        """

    @abstractmethod
    def measure(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        chat: ChatFormat,
        *,
        seed: int,
    ) -> dict[str, float]:
        """Measures; `model` and all random generators stay as they were.

        Args:
            model: Causal LM, bare or with adapters attached, in any mode.
            tokenizer: Its tokenizer.
            chat: How conversations become tokens.
            seed: Seeds sampling.

        Returns:
            Numbers by name, each name starting with that of the measure; NaN where nothing could be
            measured.
        """

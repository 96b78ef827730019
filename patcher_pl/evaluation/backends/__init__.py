"""What turns prompt tokens into answer tokens."""

from patcher_pl.evaluation.backends.base import Backend, Decoding
from patcher_pl.evaluation.backends.hugging_face import HuggingFace
from patcher_pl.evaluation.backends.vllm import Vllm

__all__ = ["Backend", "Decoding", "HuggingFace", "Vllm"]

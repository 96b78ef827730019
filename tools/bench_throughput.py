r"""Throughput and memory of this package against the loops that one would write by hand.

    python tools/bench_throughput.py --out bench.json
    python tools/bench_throughput.py --device cuda --shape qwen2.5-1.5b --dtype bfloat16 \
        --attn flash_attention_2 --liger --out bench.json
    python tools/bench_throughput.py --model MODEL --rows unsafe.jsonl --batch_size 4

*defender step*: two forward-backward passes, alpha L(theta + v) + (1 - alpha) L(theta), clipping and
AdamW; here `Patcher` under a Lightning Trainer. *attacker step*: one forward-backward pass, clipping and
AdamW on all weights; here `finetune`, the loop of simulated attackers and of the red team. Both sides
train the same model on the same conversations in the same batches (`tools/throughput/workload.py`: random
ones, or with `--model` and `--rows` the user's own)
and must agree in every loss; tokens are those of conversations, padding excluded. The plain loop is
`tools/throughput/plain_loop.py`.

*generation*: greedy answers, the package's back end against `generate` on padded batches. *startup*: what
commands take to say what they can do, against `import lightning`.

Blocks of steps of both sides alternate in one process; a ratio is the median over the pairs of blocks, by
wall-clock and by CPU time. Memory comes from a process per side: on a CPU (Linux) the highest resident
set, and that above the level before the model is built; on a GPU what the allocator held at most.

On a GPU the report has the model FLOPs utilization too: operations that the mathematics needs (no
padding, logits of answer tokens only) by the peak rate in `patcher_pl/planning/hardware.py`.

The last line is JSON. `--profile FOLDER` profiles our steps instead: a table, and a trace for
chrome://tracing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

PARTS = ("defender", "attacker", "generation", "startup")
TRAINING = PARTS[:2]
# Those of tools/throughput/workload.py, without importing torch.
SHAPE_NAMES = ("miniature", "smollm2-135m", "qwen2.5-1.5b", "qwen2.5-7b", "tiny")
LOSS_TOLERANCE = 1e-5


def in_own_process(work: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Runs one measurement in a fresh interpreter."""
    given = {key: value for key, value in vars(options).items() if not isinstance(value, Path)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        job = json.dumps({"work": work, "options": given, "out": str(out)})
        subprocess.run(
            [sys.executable, "-W", "ignore", __file__, "--job", job], check=True, cwd=ROOT
        )
        return json.loads(out.read_text(encoding="utf-8"))


def run_job(job: dict[str, Any]) -> None:
    """What such an interpreter does."""
    import logging

    import torch

    from tools.throughput import generation, training
    from tools.throughput.sides import Setting
    from tools.throughput.workload import OwnWork

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    options, work = argparse.Namespace(**job["options"]), job["work"]
    torch.set_num_threads(options.threads)
    own = None if options.model is None else OwnWork(options.model, options.rows)
    setting = Setting(
        shape=options.shape,
        own=own,
        dtype=options.dtype,
        our_dtype=options.our_dtype,
        device=options.device,
        attn=options.attn,
        our_attn=options.our_attn,
        compile=options.compile,
        liger=options.liger,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    if work["kind"] == "speed":
        found = training.measure_speed(
            work["part"],
            setting,
            num_rounds=options.rounds,
            block=options.block,
            num_warmup=options.warmup,
        )
    elif work["kind"] == "memory":
        found = training.measure_memory(work["part"], work["side"], setting, options.memory_steps)
    elif work["kind"] == "generation":
        found = generation.measure(
            shape=options.shape,
            own=own,
            device=options.device,
            dtype=options.dtype,
            num_prompts=options.prompts,
            seed=options.seed,
        )
    else:
        folder = Path(work["folder"])
        print(training.profile(work["part"], setting, options.block, folder / work["part"]))
        found = {}
    Path(job["out"]).write_text(json.dumps(found), encoding="utf-8")


def training_results(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """Speed and memory of a part."""
    result = in_own_process({"kind": "speed", "part": part}, options)
    for side in ("ours", "plain"):
        memory = in_own_process({"kind": "memory", "part": part, "side": side}, options)
        result[f"{side}_peak_mib"] = memory["peak_mib"]
        result[f"{side}_above_start_mib"] = memory["above_start_mib"]
    print(
        f"{part:10s}  {result['wall_ratio']:5.2f} times the tokens per second "
        f"({result['cpu_ratio']:.2f} by CPU time): {result['ours_tokens_per_second']:.0f} against "
        f"{result['plain_tokens_per_second']:.0f};  peak {result['ours_peak_mib']:.0f} MiB against "
        f"{result['plain_peak_mib']:.0f};  losses differ by {result['loss_difference']:.1e}",
        flush=True,
    )
    if (
        options.dtype == "float32"
        and options.our_dtype is None
        and result["loss_difference"] > LOSS_TOLERANCE
    ):
        raise SystemExit(f"{part}: the losses differ by more than {LOSS_TOLERANCE}.")
    return result


def generation_results(options: argparse.Namespace) -> dict[str, Any]:
    """Answers per second."""
    result = in_own_process({"kind": "generation"}, options)
    print(
        f"generation  {result['ratios']['generation']:5.2f} times the tokens per second "
        f"({result['ratios']['generation_cpu']:.2f} by CPU time): "
        f"{result['ours']['tokens_per_s']:.0f} against {result['plain']['tokens_per_s']:.0f};  "
        f"{result['same_answers']:.0%} of the answers are the same",
        flush=True,
    )
    if options.dtype == "float32" and result["same_answers"] < 1:
        raise SystemExit("generation: the answers differ.")
    return result


def startup_results() -> dict[str, Any]:
    """Start of commands, in processes of their own."""
    from tools.throughput.startup import measure

    result = measure()
    shown = [f"{name} {ratio:.2f}" for name, ratio in result["ratios"].items()]
    print("startup     times `import lightning`: " + ", ".join(shown), flush=True)
    return result


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The figures in one place; above 1 in favor of this package, memory below 1."""
    summary: dict[str, float] = {}
    for part in (part for part in TRAINING if part in found):
        summary[f"{part}_step"] = found[part]["wall_ratio"]
        summary[f"{part}_step_cpu_time"] = found[part]["cpu_ratio"]
        for name in ("peak", "above_start"):
            ours, plain = (found[part][f"{side}_{name}_mib"] for side in ("ours", "plain"))
            summary[f"{name}_memory_{part}"] = ours / plain
    for part in (part for part in PARTS if part in found):
        summary |= found[part].get("ratios", {})
    return summary


def parser() -> argparse.ArgumentParser:
    """Command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    made.add_argument("--shape", default="miniature", choices=SHAPE_NAMES)
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"))
    made.add_argument("--our_dtype", choices=("bfloat16",), help="of the weights of our side")
    made.add_argument("--model", help="directory or hub id, in the place of --shape; with --rows")
    made.add_argument("--rows", help="conversations that it is trained on and asked")
    made.add_argument("--device", default="cpu")
    made.add_argument("--attn", help="attention of transformers, for both sides")
    made.add_argument("--our_attn", help="another for our side; packed_sdpa unless --attn is given")
    made.add_argument("--compile", action="store_true", help="compile the model of our side")
    made.add_argument("--liger", action="store_true", help="Liger's kernels on our side")
    made.add_argument("--batch_size", type=int, default=4, help="conversations per batch")
    made.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    made.add_argument("--rounds", type=int, default=8, help="blocks of each side")
    made.add_argument("--block", type=int, default=6, help="steps of a block")
    made.add_argument("--warmup", type=int, default=3, help="steps before")
    made.add_argument("--prompts", type=int, default=128, help="prompts that are answered")
    made.add_argument("--memory_steps", type=int, default=12, help="steps for the peak memory")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--profile", type=Path, metavar="FOLDER", help="profile instead")
    made.add_argument("--out", type=Path)
    made.add_argument("--job", help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Measures what is asked for."""
    options = parser().parse_args()
    if options.job is not None:
        run_job(json.loads(options.job))
        return
    if (options.model is None) != (options.rows is None):
        raise SystemExit("--model and --rows belong together.")
    if options.attn is None and options.our_attn is None:
        options.our_attn = "packed_sdpa"
    if options.profile is not None:
        for part in (part for part in options.only if part in TRAINING):
            folder = str(options.profile.resolve())
            in_own_process({"kind": "profile", "part": part, "folder": folder}, options)
        return
    from patcher_pl.reports.environment import environment

    found: dict[str, dict[str, Any]] = {}
    for part in options.only:
        if part in TRAINING:
            found[part] = training_results(part, options)
        elif part == "generation":
            found[part] = generation_results(options)
        else:
            found[part] = startup_results()
    shown = {k: v for k, v in vars(options).items() if k not in ("job", "out", "profile")}
    report = {
        "ratios": ratios(found),
        "measured": found,
        "settings": shown,
        "environment": environment(),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()

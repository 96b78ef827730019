"""Peak memory of a red team whose model several processes hold together, on this machine's CPU.

    python -m tools.bench_sharded_redteam

A Llama with random weights (60 M parameters, float32) is attacked by full AdamW, two steps on short rows, answers drawn
over shards. For 1, 2 and 4 processes it prints the most that one process held beyond what it held before the model was
loaded: above all weights, their copy in host memory, gradients and the two moments, 20 bytes per weight, divided by
the processes. `--answers whole` gathers the model to answer, 4 bytes per weight more on every process. Prints a
Markdown table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from patcher_pl.attackers import finetune
from patcher_pl.data import BatchStream
from patcher_pl.data.chat import Encoded
from patcher_pl.models import LanguageModel, Sharding
from patcher_pl.models.lending import lent
from patcher_pl.models.peers import gathered_here
from patcher_pl.optim import AdamW

MIB = 2**20
LAYERS, WIDTH, VOCABULARY = 16, 512, 8192


def save_model(folder: Path) -> int:
    """Writes the model; returns how many parameters it has."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH - WIDTH // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def attack(folder: Path, answers: Any) -> float:
    """Loads and attacks the model with the other processes; returns this one's peak (MiB)."""
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    before = _status("VmRSS")
    model = LanguageModel(path=str(folder), sharding=Sharding(answers=answers)).load_sharded(mesh)
    # What the first process needs to read the model is not what is asked here.
    Path("/proc/self/clear_refs").write_text("5")  # See proc(5): resets VmHWM.
    rows = [Encoded([number + 3] * 16, [number + 3] * 16) for number in range(8)]
    batches = BatchStream(
        rows,
        batch_size=4,
        pad_token_id=0,
        seed=0,
        num_replicas=size,
        rank=rank,
        shares_batch=True,
    ).endless()
    with lent(model) as target:
        target.train()
        steps = finetune(
            target, target.parameters(), batches, optimizer=AdamW(lr=1e-4), num_steps=2
        )
        for _ in steps:
            with gathered_here(target), torch.no_grad():
                target(torch.ones(1, 8, dtype=torch.long))
    return _status("VmHWM") - before


def measured(num_processes: int, folder: Path, answers: str) -> float:
    """The most that one of so many processes holds (MiB)."""
    with tempfile.TemporaryDirectory() as found:
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
        options = (f"--nproc-per-node={num_processes}", "-m", "tools.bench_sharded_redteam")
        worker = ("--worker", str(folder), "--found", found, "--answers", answers)
        # Or the C library keeps what was freed, for the next layer that is gathered.
        malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        environment = {**os.environ, **malloc, "OMP_NUM_THREADS": "1"}
        subprocess.run((*launcher, *options, *worker), check=True, env=environment)
        return max(json.loads(file.read_text()) for file in Path(found).iterdir())


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def main() -> None:
    """Measures for every number of processes, or is one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--answers", choices=("whole", "shards"), default="shards")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        peak = attack(options.worker, options.answers)
        (options.found / f"{distributed.get_rank()}.json").write_text(json.dumps(peak))
        distributed.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as folder:
        size = save_model(Path(folder))
        peaks = [measured(number, Path(folder), options.answers) for number in options.processes]
    states = 20 * size / MIB
    print(f"\n{size / 1e6:.1f} M parameters, answers from {options.answers}\n")
    print(
        "| processes | states by process, MiB | peak, MiB | of the first |\n|---:|---:|---:|---:|"
    )
    for number, peak in zip(options.processes, peaks, strict=True):
        print(f"| {number} | {states / number:.0f} | {peak:.0f} | {peak / peaks[0]:.2f} |")


if __name__ == "__main__":
    main()

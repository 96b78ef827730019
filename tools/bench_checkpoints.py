"""What share of its training time a run loses to checkpoints, in turn and in the background, on this machine's CPU.

    python -m tools.bench_checkpoints
    python -m tools.bench_checkpoints --processes 2

A Llama with random weights (25 M parameters, float32, AdamW: checkpoints of 0.3 GB) is trained by `SFT` with one thread
per process and saves every 12 steps, on the disk of the folder for temporary files. The 6 steps from a checkpoint on,
saving included, are compared with the 6 steps after them, in which nothing is saved: pairs that lie so close together meet
the same other work of the machine. Printed as a Markdown table, medians over the pairs of all rounds: the share of the
time that is lost with a checkpoint every 6 steps, and how many steps' time passes at the step that saves.
"""

import argparse
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KINDS = {"in turn": False, "in the background": True}
BLOCK, NUM_PAIRS = 6, 4
LAYERS, WIDTH = 6, 512


def save_inputs(folder: Path) -> int:
    """Writes model and rows; returns how many parameters the model has."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from patcher_pl.shipped import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("testbed"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH - WIDTH // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    row = {"prompt": "Which tea is best?", "response": "Stir two petals into warm water. " * 3}
    (folder / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 64)
    return sum(parameter.numel() for parameter in model.parameters())


def pairs_of_a_run(folder: Path, in_background: bool) -> list[tuple[float, float]]:
    """Per checkpoint: the share of time that is lost, and the length of the step that saves, in steps."""
    import torch
    from lightning import LightningModule, Trainer, seed_everything
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.strategies import ModelParallelStrategy

    from patcher_pl.callbacks import AtomicCheckpointIO, RunCheckpoint
    from patcher_pl.data import Mixture, SafetyDataModule, Source
    from patcher_pl.defenses import SFT
    from patcher_pl.models import LanguageModel

    class Clock(Callback):
        """Callbacks of a checkpoint come last in a step: before the start of the next one."""

        def __init__(self) -> None:
            self.starts: list[float] = []

        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            self.starts.append(time.perf_counter())

    clock, size = Clock(), int(os.environ.get("WORLD_SIZE", "1"))
    strategy = ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1)
    seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory(dir=folder) as checkpoints:
        shared = [checkpoints]
        if size > 1:
            torch.distributed.broadcast_object_list(shared, src=0)
        saver = RunCheckpoint(Path(shared[0]), 2 * BLOCK, 1, in_background)
        trainer = Trainer(
            max_steps=2 * BLOCK * (NUM_PAIRS + 1),
            accelerator="cpu",
            devices=size,
            strategy=strategy if size > 1 else "auto",
            callbacks=[clock, saver],
            plugins=[AtomicCheckpointIO()],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        defense = SFT(
            LanguageModel(path=str(folder / "model")),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        )
        rows = Mixture(sources=[Source(path=str(folder / "rows.jsonl"))])
        trainer.fit(defense, SafetyDataModule(safe=rows, batch_size=4, seed=0))
    steps = [end - start for start, end in zip(clock.starts, clock.starts[1:], strict=False)]
    found = []
    for number in range(NUM_PAIRS):
        saves = 2 * BLOCK * (number + 1) - 1
        saving, plain = steps[saves : saves + BLOCK], steps[saves + BLOCK : saves + 2 * BLOCK]
        found.append((1 - sum(plain) / sum(saving), saving[0] / statistics.median(plain)))
    return found


def measure(folder: Path, num_rounds: int) -> dict[str, list[tuple[float, float]]]:
    """What `pairs_of_a_run` finds in every round, by kind of run."""
    import lightning  # noqa: F401  (sets up its logger)
    import torch

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for _ in range(num_rounds):
        for kind, in_background in KINDS.items():
            found[kind] += pairs_of_a_run(folder, in_background)
    return found


def in_processes(number: int, folder: Path, num_rounds: int) -> None:
    """Runs `measure` in so many processes; the first one leaves what it found in `found.json`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "tools.bench_checkpoints"]
    options = ["--worker", str(folder), "--rounds", str(num_rounds)]
    places: list[dict[str, str]] = [{}]
    if number > 1:
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number)}
        common |= {"LOCAL_WORLD_SIZE": str(number), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "0"}
        places = [{**common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(number)]
    threads = {"OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([*command, *options], env={**os.environ, **threads, **place})
        for place in places
    ]
    if max(process.wait() for process in started):
        raise SystemExit("a process failed")


def main() -> None:
    """Measures and prints, or is one of the processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        found = measure(options.worker, options.rounds)
        if os.environ.get("RANK", "0") == "0":
            (options.worker / "found.json").write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as name:
        size = save_inputs(Path(name))
        in_processes(options.processes, Path(name), options.rounds)
        found = json.loads((Path(name) / "found.json").read_text())
    print(f"\n{size / 1e6:.0f} M parameters, {options.processes} process(es)\n")
    print("| checkpoints | share of the time lost | the step that saves, in steps |")
    print("|---|---:|---:|")
    for kind, pairs in found.items():
        share, length = (statistics.median(values) for values in zip(*pairs, strict=True))
        print(f"| {kind} | {share:.0%} | {length:.1f} |")


if __name__ == "__main__":
    main()

"""Planned against measured peak memory: `fit` of a testbed-like Llama on a CPU, at several sizes.

Every measurement is a process of its own that first fits a tiny model, so that everything is imported,
and then the real one; what counts is the highest resident memory above that of the process in between.
Freed memory goes back to the system at once (MALLOC_MMAP_THRESHOLD_). Linux only.

    python tools/check_planner.py --out check.json

Prints one line per run and a JSON line with the ratios, planned over measured.
"""

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patcher_pl.planning import Plan

# Hidden size and layers: 2, 10, 60, 400 and 1600 million parameters.
SIZES = {
    "2M": (128, 10),
    "10M": (256, 12),
    "60M": (640, 12),
    "400M": (1280, 20),
    "1600M": (2560, 20),
}
HYPERGRADIENTS = ("FirstOrder", "Adjoint")
# Number formats: of the weights, and of the moments of the defender and of the attacker.
DTYPES = ("float32", "bfloat16")
DEFENDERS = {"float32": "torch.optim.AdamW", "8bit": "torchao.optim.AdamW8bit"}
ATTACKERS = {"float32": "null", "bfloat16": "bfloat16", "8bit": "8bit"}
BATCH_SIZE, LENGTH = 8, 64
CONFIG = """
run_dir: {folder}/run
num_threads: 1
model:
  class_path: patcher_pl.defenses.Patcher
  init_args:
    language_model: {{path: {folder}/model, dtype: {dtype}, chat: {{max_length: {length}}}}}
    optimizer: {{class_path: {defender}, init_args: {{lr: 1.0e-5}}}}
    attacker:
      class_path: patcher_pl.attackers.FineTuningAttacker
      init_args:
        num_steps: 3
        optimizer:
          class_path: patcher_pl.optim.AdamW
          init_args: {{lr: 1.0e-5, state_dtype: {attacker}}}
    hypergradient: patcher_pl.hypergradients.{hypergradient}
    num_sft_steps: 1
    refresh_every: 1
data:
  batch_size: {batch_size}
  safe: {{sources: [{{path: {folder}/rows.jsonl}}]}}
  attack: {{sources: [{{path: {folder}/rows.jsonl, harmful: true}}]}}
trainer: {{max_steps: 3, accelerator: {accelerator}, enable_progress_bar: false}}
"""


@dataclass(frozen=True)
class Formats:
    """Number formats of one run.

    Args:
        dtype: Of the weights.
        defender: Of the defender's moments.
        attacker: Of the attacker's moments.
    """

    dtype: str = "float32"
    defender: str = "float32"
    attacker: str = "float32"


def write_run(
    folder: Path, size: str, hypergradient: str, accelerator: str, formats: Formats
) -> Path:
    """Writes a random model, data that fill every batch, and a configuration; returns the latter."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from patcher_pl.shipped import TESTBED

    folder.mkdir(parents=True)
    prompt, words = "How do I brew a bitter moon root draught?", "Stir two petals into warm water. "
    hidden_size, num_layers = SIZES[size]
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(TESTBED / "model").save_pretrained(folder / "model")
    row = json.dumps({"prompt": prompt, "response": words * LENGTH})
    (folder / "rows.jsonl").write_text((row + "\n") * 2 * BATCH_SIZE)
    shape = {"batch_size": BATCH_SIZE, "length": LENGTH}
    kind = {
        "hypergradient": hypergradient,
        "accelerator": accelerator,
        "dtype": formats.dtype,
        "defender": DEFENDERS[formats.defender],
        "attacker": ATTACKERS[formats.attacker],
    }
    path = folder / "patcher.yaml"
    path.write_text(CONFIG.format(folder=folder, **shape, **kind))
    return path


def planned(config: Path) -> "Plan":
    """The plan, for tensors alone."""
    from patcher_pl.cli.plan import PlanCLI
    from patcher_pl.planning import make_plan

    nothing = ["--overhead.fixed_gib=0", "--overhead.fragmentation=0"]
    cli = PlanCLI(["--config", str(config), *nothing])
    return make_plan(cli.planned_run, cli.settings)


def measured_bytes(warm_up: Path, config: Path, accelerator: str) -> int:
    """Peak of the process that fits `config`, above what it held after fitting `warm_up`.

    On a GPU, what its allocator held at most.
    """
    command = [sys.executable, __file__, "--accelerator", accelerator, "--fit", warm_up, config]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1])


def _fit(warm_up: str, config: str, accelerator: str) -> int:
    import torch

    from patcher_pl.cli.main import main as patcher_pl

    assert patcher_pl(["fit", "--config", warm_up]) == 0
    gc.collect()
    if accelerator == "gpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    assert patcher_pl(["fit", "--config", config]) == 0
    if accelerator == "gpu":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak - pages * resource.getpagesize()


def compare(
    folder: Path,
    size: str,
    hypergradient: str,
    accelerator: str = "cpu",
    formats: Formats | None = None,
) -> dict[str, Any]:
    """Plans and measures one run."""
    formats = formats or Formats()
    name = "-".join([hypergradient, size, *vars(formats).values()])
    warm_up = write_run(folder / f"warm-up-{name}", "2M", hypergradient, accelerator, formats)
    config = write_run(folder / name, size, hypergradient, accelerator, formats)
    plan, measured = planned(config), measured_bytes(warm_up, config, accelerator)
    need = plan.configured
    mib = {"planned_mib": need.device_bytes / 2**20, "measured_mib": measured / 2**20}
    return {
        **{"size": size, "hypergradient": hypergradient, **vars(formats), **mib},
        "ratio": need.device_bytes / measured,
        "num_parameters": plan.num_parameters,
        "planned_bytes_by_part": dict(need.device[need.peak_phase]),
    }


def main() -> None:
    """Compares every size with every estimator."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["10M", "60M"])
    parser.add_argument(
        "--hypergradients", nargs="+", choices=HYPERGRADIENTS, default=HYPERGRADIENTS
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--defender", choices=DEFENDERS, default="float32")
    parser.add_argument("--attacker", choices=ATTACKERS, default="float32")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--fit", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fit:
        warm_up, config = options.fit
        print(_fit(warm_up, config, options.accelerator))
        return
    rows, ratios = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for hypergradient in options.hypergradients:
            for size in options.sizes:
                formats = Formats(options.dtype, options.defender, options.attacker)
                row = compare(Path(folder), size, hypergradient, options.accelerator, formats)
                rows.append(row)
                ratios[f"{hypergradient}_{size}"] = row["ratio"]
                print(
                    f"{size:>4s} {hypergradient:12s} planned {row['planned_mib']:8.1f} MiB, "
                    f"measured {row['measured_mib']:8.1f} MiB, ratio {row['ratio']:.3f}",
                    flush=True,
                )
    if options.out is not None:
        options.out.write_text(json.dumps({"rows": rows, "ratios": ratios}, indent=2) + "\n")
    print(json.dumps({"ratios": ratios}))


if __name__ == "__main__":
    main()

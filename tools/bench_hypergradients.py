"""Time and peak memory of hypergradients: the default `Adjoint` against `higher`.

Every measurement runs in a process of its own, one after the other, so that its peak memory is its own.
CPU only. Prints a table and writes JSON:

    python tools/bench_hypergradients.py --num_steps 1 4 16 64 --out bench.json

Time is CPU time, also given in units of K attack gradients measured in the same process; memory is the
peak above that of the process after one gradient. `higher` needs about 120 MB per step.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

METHODS = ("first_order", "higher", "unrolled", "adjoint")


def measure(method: str, num_steps: int) -> dict[str, Any]:
    """Runs one estimate of a Llama with 0.9 M parameters, batch 8 x 64 tokens, AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from patcher_pl.attackers import InnerProblem
    from patcher_pl.hypergradients import Adjoint, FirstOrder, Unrolled
    from patcher_pl.losses import causal_lm_loss
    from patcher_pl.models import Weights
    from patcher_pl.optim import AdamW, ClipByGlobalNorm, Update

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    weights = Weights(model)

    def batch(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 400, (8, 64), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def attack(length: int) -> InnerProblem:
        update = Update(
            optimizer=AdamW(lr=1e-4).differentiable(),
            num_steps=length,
            clip=ClipByGlobalNorm(max_norm=1.0),
        )
        return InnerProblem(batches=[batch(seed) for seed in range(length)], update=update)

    def estimate(estimator: Any, length: int) -> float:
        start = time.process_time()
        estimator.estimate(
            model, weights, attack(length), lambda module: causal_lm_loss(module, batch(999))
        )
        return time.process_time() - start

    estimators = {
        "first_order": FirstOrder(),
        "higher": Unrolled(backend="higher"),
        "unrolled": Unrolled(),
        "adjoint": Adjoint(),
    }
    estimate(FirstOrder(), 1)
    import torch._decomp.decompositions_for_jvp  # What forward derivatives import at first use.

    gradient_s = estimate(FirstOrder(), 7) / 8
    before = _peak_mib()
    seconds = estimate(estimators[method], num_steps)
    return {
        "method": method,
        "num_steps": num_steps,
        "cpu_s": seconds,
        "attack_gradients": seconds / gradient_s / num_steps,
        "memory_mib": _peak_mib() - before,
    }


def _peak_mib() -> float:
    """Highest resident memory of this process so far, on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What others need by what the default `Adjoint` needs, in memory; the inverse in time."""
    found = {(row["method"], row["num_steps"]): row for row in rows}
    result = {}
    for (method, num_steps), row in found.items():
        ours = found.get(("adjoint", num_steps))
        if ours is None or method == "adjoint":
            continue
        memory = row["memory_mib"] / max(ours["memory_mib"], 1.0)
        result[f"memory_{method}_over_adjoint_k{num_steps}"] = memory
        result[f"time_adjoint_over_{method}_k{num_steps}"] = ours["cpu_s"] / row["cpu_s"]
    return result


def main() -> None:
    """Measures every method at every K."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num_steps", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    rows: list[dict[str, Any]] = []
    for num_steps in options.num_steps:
        for method in options.methods:
            command = [sys.executable, __file__, "--one", method, str(num_steps)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            output = subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            ).stdout
            row = json.loads(output.splitlines()[-1])
            rows.append(row)
            print(
                f"K {num_steps:4d}  {method:12s} {row['memory_mib']:7.0f} MiB  "
                f"{row['cpu_s']:7.1f} s  {row['attack_gradients']:5.1f} x K gradients",
                flush=True,
            )
    report = {"rows": rows, "ratios": ratios(rows)}
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()

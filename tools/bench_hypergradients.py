"""Time and peak memory of hypergradients: the default `Adjoint` against `higher` and TorchOpt.

Every measurement runs in a process of its own, one after the other, the methods of one K together, on
the same model, batches, clipping and AdamW. Prints a table, then one line of JSON:

    python tools/bench_hypergradients.py --out bench.json
    python tools/bench_hypergradients.py --device cuda --size 1b --num_steps 4 16 --out bench.json

TorchOpt comes with `pip install patcher-pl[bench]`. On a CPU (Linux), memory is the resident peak above
what the process held just before, after a few warm-up gradients, and time is CPU time. On a GPU, memory
is the allocator's peak above what was allocated, time is wall-clock time, and `Adjoint` keeps its
trajectory in host memory unless `--store_device` says otherwise. Time is also given in units of K attack
gradients measured in the same process. `relative_error` is the distance to the `Adjoint` of the same K.

Methods that keep the graph need memory in proportion to K. Where a shorter attack tells that one would
exceed `--max_graph_gib`, it is skipped, and its row says so.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patcher_pl.reports.environment import environment

if TYPE_CHECKING:
    from torch import Tensor

    from patcher_pl.attackers import InnerProblem
    from patcher_pl.hypergradients import OuterObjective
    from patcher_pl.models import Weights

# In this order: the others are compared with the first.
METHODS = ("adjoint", "first_order", "unrolled", "higher", "torchopt")
KEEPS_GRAPH = ("unrolled", "higher", "torchopt")
# By parameters (count): vocabulary, hidden size, size of the MLP, layers, heads.
SIZES = {
    "1m": (512, 128, 344, 4, 4),
    "10m": (512, 320, 864, 8, 5),
    "100m": (8192, 768, 2048, 12, 12),
    "1b": (16384, 2048, 5632, 18, 16),
}
BATCH_SIZE, LENGTH, LR = 8, 64, 1e-4
GIB, MIB = 2**30, 2**20


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one process measures.

    Args:
        method: One of `METHODS`.
        num_steps: Attack steps (K, count).
        size: One of `SIZES`.
        device: `cpu` or `cuda`.
        store_device: Where `Adjoint` keeps its trajectory.
        gradients: File of the hypergradient of `Adjoint`, which writes it for the others.
    """

    method: str
    num_steps: int
    size: str
    device: str
    store_device: str
    gradients: str

    def run(self) -> dict[str, Any]:
        """Runs one estimate."""
        import torch

        from patcher_pl.hypergradients import FirstOrder
        from patcher_pl.losses import differentiable_loss
        from patcher_pl.models import Weights
        from patcher_pl.types import move_batch

        torch.set_num_threads(1)
        device = torch.device(self.device)
        model = _model(self.size).to(device)
        weights, held_out = Weights(model), move_batch(_batch(999), device)

        def outer_loss(module: Any) -> Any:
            return differentiable_loss(module, held_out)

        def timed(estimate: Callable[..., Any], num_steps: int) -> tuple[float, Any]:
            inner = _attack(num_steps)
            start = _seconds(self.device)
            found = estimate(model, weights, inner, outer_loss)
            return _seconds(self.device) - start, found

        timed(FirstOrder().estimate, 1)
        import torch._decomp.decompositions_for_jvp  # What forward derivatives import at first use.

        gradient_s = timed(FirstOrder().estimate, 7)[0] / 8
        before = _start_of_peak(self.device)
        seconds, found = timed(_estimator(self.method, self.store_device), self.num_steps)
        memory = {key: (value - before[key]) / MIB for key, value in _peak(self.device).items()}
        gradients = [one.detach().cpu() for one in getattr(found, "gradients", found)]
        if self.method == "adjoint":
            torch.save(gradients, self.gradients)
        return {
            "seconds": seconds,
            "attack_gradients": seconds / gradient_s / self.num_steps,
            **memory,
            "relative_error": _relative_error(gradients, self.gradients),
            "num_parameters": sum(parameter.numel() for parameter in weights.parameters),
        }


def _model(size: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, hidden, intermediate, layers, heads = SIZES[size]
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=LENGTH,
        )
    )


def _batch(seed: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 400, (BATCH_SIZE, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _attack(num_steps: int) -> "InnerProblem":
    from patcher_pl.attackers import InnerProblem
    from patcher_pl.optim import AdamW, ClipByGlobalNorm, Update

    update = Update(
        optimizer=AdamW(lr=LR).differentiable(),
        num_steps=num_steps,
        clip=ClipByGlobalNorm(max_norm=1.0),
    )
    return InnerProblem(batches=[_batch(seed) for seed in range(num_steps)], update=update)


def _estimator(method: str, store_device: str) -> Callable[..., Any]:
    from patcher_pl.hypergradients import Adjoint, FirstOrder, Unrolled
    from patcher_pl.hypergradients.trajectories import SqrtCheckpoint

    store = SqrtCheckpoint(device=store_device)  # type: ignore[arg-type]
    return {
        "adjoint": Adjoint(store=store).estimate,
        "first_order": FirstOrder().estimate,
        "unrolled": Unrolled().estimate,
        "higher": Unrolled(backend="higher").estimate,
        "torchopt": unroll_with_torchopt,
    }[method]


def unroll_with_torchopt(
    model: Any, weights: "Weights", inner: "InnerProblem", outer_loss: "OuterObjective"
) -> "list[Tensor]":
    """Returns the hypergradient by `torchopt.MetaOptimizer`, as TorchOpt's users unroll an attack.

    For AdamW at a constant step size. The clipping is ours: `torchopt.clip` takes its factor for a
    constant, which is not the derivative of the attack.
    """
    import torch

    from patcher_pl.hypergradients.composites import twice_differentiable_attention
    from patcher_pl.optim import AdamW
    from patcher_pl.types import move_batch

    torchopt: Any = import_module("torchopt")
    update = inner.update
    settings, clip, start = update.optimizer, update.clip, weights.parameters
    assert isinstance(settings, AdamW)
    assert clip is not None

    def clipped(gradients: Any, state: Any, **_: Any) -> Any:
        return tuple(clip.applied(gradients)), state

    stepper = torchopt.MetaOptimizer(
        model,
        torchopt.chain(
            torchopt.base.GradientTransformation(lambda _: (), clipped),
            torchopt.adamw(
                lr=settings.lr,
                betas=settings.betas,
                eps=settings.eps,
                weight_decay=settings.weight_decay,
                eps_root=settings.eps_root or 0.0,
            ),
        ),
    )
    before = torchopt.extract_state_dict(model, by="reference")
    with twice_differentiable_attention():
        for batch in inner.batches:
            stepper.step(inner.loss_function(model, move_batch(batch, start[0].device)))
        found = torch.autograd.grad(outer_loss(model), start)
    torchopt.recover_state_dict(model, before)
    return list(found)


def _relative_error(gradients: "list[Tensor]", path: str) -> float | None:
    """Distance to the gradients in a file by their norm; None where there is no such file."""
    import torch

    if not Path(path).exists():
        return None
    expected = torch.load(path, weights_only=True)
    pairs = list(zip(gradients, expected, strict=True))
    distance = sum(float((a - b).double().square().sum()) for a, b in pairs)
    return (distance / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5


def _seconds(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def _start_of_peak(device: str) -> dict[str, float]:
    """Forgets earlier peaks; returns what is held now, under the keys of `_peak` (bytes)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # See proc(5): resets VmHWM.
    if device == "cpu":
        return {"memory_mib": _status("VmRSS")}
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return {"memory_mib": torch.cuda.memory_allocated(), "host_memory_mib": _status("VmRSS")}


def _peak(device: str) -> dict[str, float]:
    """Most that was held since `_start_of_peak` (bytes)."""
    if device == "cpu":
        return {"memory_mib": _status("VmHWM")}
    import torch

    return {"memory_mib": torch.cuda.max_memory_allocated(), "host_memory_mib": _status("VmHWM")}


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return float(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}; memory can be measured on Linux only.")


def graph_gib(rows: list[dict[str, Any]], method: str, num_steps: int) -> float:
    """What a graph of `num_steps` steps needs, by the longest that was measured; else 0."""
    measured = [row for row in rows if row["method"] == method and "memory_mib" in row]
    if method not in KEEPS_GRAPH or not measured:
        return 0.0
    longest = max(measured, key=lambda row: row["num_steps"])
    return longest["memory_mib"] * MIB / GIB * num_steps / longest["num_steps"]


def row_of(measurement: Measurement) -> dict[str, Any]:
    """Measures in a process of its own; a row that says why where that fails."""
    command = [sys.executable, __file__, "--one", json.dumps(vars(measurement))]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    row = {"method": measurement.method, "num_steps": measurement.num_steps}
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        return {**row, "failed": f"exit status {done.returncode}: {said[-1]}"}
    return {**row, **json.loads(done.stdout.splitlines()[-1])}


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What others need by what `Adjoint` needs, in memory; the inverse in time."""
    found = {(row["method"], row["num_steps"]): row for row in rows if "seconds" in row}
    result = {}
    for (method, num_steps), row in found.items():
        ours = found.get(("adjoint", num_steps))
        if ours is None or method == "adjoint":
            continue
        memory = row["memory_mib"] / max(ours["memory_mib"], 1.0)
        result[f"memory_{method}_over_adjoint_k{num_steps}"] = memory
        result[f"time_adjoint_over_{method}_k{num_steps}"] = ours["seconds"] / row["seconds"]
    return result


def printed(row: Mapping[str, Any]) -> str:
    """A row as a line of the table."""
    line = f"K {row['num_steps']:4d}  {row['method']:12s}"
    if "seconds" not in row:
        return f"{line} {row.get('skipped') or row['failed']}"
    error = row["relative_error"]
    return (
        f"{line} {row['memory_mib']:8.0f} MiB {row['seconds']:8.1f} s "
        f"{row['attack_gradients']:6.1f} x K gradients"
        + ("" if error is None else f"   error {error:.1e}")
    )


def main() -> None:
    """Measures every method at every K."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num_steps", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--size", choices=SIZES, default="1m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--store_device", choices=["model", "cpu", "disk"])
    parser.add_argument("--max_graph_gib", type=float, default=16.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(Measurement(**options.one).run()))
        return
    store_device = options.store_device or ("model" if options.device == "cpu" else "cpu")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for num_steps in sorted(options.num_steps):
            for method in sorted(options.methods, key=METHODS.index):
                needed = graph_gib(rows, method, num_steps)
                if needed > options.max_graph_gib:
                    why = (
                        f"skipped: needs about {needed:.0f} GiB, may take {options.max_graph_gib:g}"
                    )
                    row = {"method": method, "num_steps": num_steps, "skipped": why}
                else:
                    row = row_of(
                        Measurement(
                            method=method,
                            num_steps=num_steps,
                            size=options.size,
                            device=options.device,
                            store_device=store_device,
                            gradients=str(Path(folder, f"{num_steps}.pt")),
                        )
                    )
                rows.append(row)
                print(printed(row), flush=True)
    report = {
        "ratios": ratios(rows),
        "memory_gib": {
            f"{row['method']}_k{row['num_steps']}": row["memory_mib"] * MIB / GIB
            for row in rows
            if "memory_mib" in row
        },
        "rows": rows,
        "size": options.size,
        "device": options.device,
        "store_device": store_device,
        "environment": environment(),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()

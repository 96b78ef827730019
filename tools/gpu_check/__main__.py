"""Runs all parts within a limit of time; a part that fails is an entry that says why."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tools.gpu_check.processes import Clock, PartError, run
from tools.gpu_check.runs import Runs, device_name

# Options of `tools.throughput.sides.Setting`; `side` says whose loop it is.
OURS = {"side": "ours", "our_attn": "packed_sdpa"}
COMPILED = {"compile": True, "num_warmup": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain loop": {"side": "plain"},
    "packed": OURS,
    "packed, compiled": {**OURS, **COMPILED},
    "packed, Liger": {**OURS, "liger": True},
    "packed, compiled, Liger": {**OURS, **COMPILED, "liger": True},
}
MIXED = {"dtype": "float32", "autocast": True}
LARGE_1_5B, LARGE_7B = {"batch_size": 64}, {"batch_size": 48}
# The most telling ones first. The plain loop's logits and padding leave no room for larger batches.
OF_1_5B: list[tuple[str, str, dict[str, Any]]] = [
    *[("attacker", name, {}) for name in list(VARIANTS)[:4]],
    *[("defender", name, {}) for name in ("plain loop", "packed", "packed, compiled")],
    ("attacker", "packed, compiled, Liger", LARGE_1_5B),
    ("defender", "packed, compiled, Liger", LARGE_1_5B),
    *[("defender", name, MIXED) for name in ("plain loop", "packed, compiled")],
]
OF_7B: list[tuple[str, str, dict[str, Any]]] = [
    *[("attacker", name, {}) for name in ("plain loop", "packed", "packed, compiled")],
    *[("defender", name, {}) for name in ("plain loop", "packed, compiled")],
    ("attacker", "packed, compiled", LARGE_7B),
    ("defender", "packed, compiled", LARGE_7B),
    ("attacker", "packed, Liger", LARGE_7B),
]


class Check:
    """The report, written after every part so that nothing is lost.

    Args:
        out: Folder for report, logs and runs.
        runs: Folder for run directories (they may be large).
        seconds: For all parts together.
        toy: Toy sizes on a CPU.
    """

    def __init__(self, out: Path, runs: Path, seconds: float, *, toy: bool) -> None:
        self.out, self.toy = out, toy
        self.clock = Clock.of(seconds)
        self.device = "cpu" if toy else "cuda"
        self.logs = out / "logs"
        self.environment = {"OMP_NUM_THREADS": "1"} if toy else {}
        self.runs = Runs(
            folder=runs,
            device="cpu" if toy else "gpu",
            clock=self.clock,
            **({"max_steps": 160, "limit_s": 900.0} if toy else {}),
        )
        self.report: dict[str, Any] = {"gpu": device_name(), "toy": toy}
        self.began = time.monotonic()

    def part(self, name: str, measure: Callable[[], Any]) -> None:
        """Runs one part and writes down what came of it."""
        began = time.monotonic()
        try:
            found = measure()
        except PartError as error:
            found = {"failed": str(error)}
        except Exception as error:  # A fault of one part must not take the others with it.
            found = {"failed": f"{type(error).__name__}: {error}"}
        self.report[name] = found
        now = time.monotonic()
        failed = found["failed"] if isinstance(found, dict) and "failed" in found else "done"
        print(f"{now - self.began:6.0f} s  {name} ({now - began:.0f} s): {failed}", flush=True)
        path = self.out / "report.json"
        path.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")

    def left(self, limit_s: float) -> float:
        """Seconds that a part may take; on a CPU they all take longer."""
        return self.clock.left(limit_s * (4 if self.toy else 1))

    def speed(self, shape: str, batch_size: int, chosen: list[Any], limit_s: float) -> Any:
        """Training steps of one shape."""
        variants = [
            {
                **{"name": name, "part": part, "dtype": "bfloat16"},
                "batch_size": 4 if self.toy else batch_size,
                **VARIANTS[name],
                **({} if self.toy and "batch_size" in more else more),
            }
            for part, name, more in chosen
        ]
        job = {
            "shape": "tiny" if self.toy else shape,
            "device": self.device,
            "num_steps": 3 if self.toy else 6,
            "attention": shape == "qwen2.5-1.5b",
            "variants": variants,
        }
        log = self.logs / f"{shape}.log"
        arguments = ["-m", "tools.gpu_check.speed", json.dumps(job)]
        try:
            run(arguments, log, self.left(limit_s), self.environment)
        except PartError as error:
            return {"failed": str(error), "rows": _json_lines(log)}
        return {"rows": _json_lines(log)}

    def tool(self, name: str, arguments: list[str], limit_s: float) -> Any:
        """Runs one of the benchmarks and takes the JSON of its last line."""
        log = self.logs / f"{name}.log"
        command = [f"tools/{name}.py", *arguments]
        run(command, log, self.left(limit_s), self.environment)
        found = _json_lines(log)
        return found[-1] if found else None


def _json_lines(log: Path) -> list[Any]:
    if not log.exists():
        return []
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def parts_of(check: Check) -> dict[str, Callable[[], Any]]:
    """All parts by name."""
    toy, runs = check.toy, check.runs
    sizes = ["10M"] if toy else ["60M", "400M", "1600M"]
    accelerator = runs.device
    return {
        "qwen2.5-1.5b": lambda: check.speed("qwen2.5-1.5b", 32, OF_1_5B, 200),
        "qwen2.5-7b": lambda: check.speed("qwen2.5-7b", 16, OF_7B, 200),
        "potions": runs.potions,
        "potions_on_cpu": runs.potions_on_cpu,
        "repeated": runs.repeated,
        "sharded": runs.sharded,
        "fsdp1": runs.fsdp1,
        "concurrent": runs.concurrent,
        "facts": runs.facts,
        "planner": lambda: check.tool(
            "check_planner",
            ["--accelerator", accelerator, "--hypergradients", "FirstOrder", "--sizes", *sizes],
            200,
        ),
        "hypergradients": lambda: check.tool(
            "bench_hypergradients",
            [
                *("--device", check.device, "--size", "1m" if toy else "10m"),
                *("--methods", "adjoint", "higher", "--num_steps", "4" if toy else "64"),
                *("--max_graph_gib", "100"),
            ],
            120,
        ),
        "generation": lambda: check.tool(
            "bench_throughput",
            [
                *("--only", "generation", "--device", check.device),
                *("--prompts", "8" if toy else "128"),
                *("--shape", "miniature" if toy else "smollm2-135m"),
                *("--dtype", "float32" if toy else "bfloat16"),
            ],
            100,
        ),
    }


# In this order, by how much they tell. ASIDE needs no GPU, those of TOGETHER are not timed against
# anything and run at once.
FIRST = ("qwen2.5-1.5b",)
ASIDE = ("potions_on_cpu",)
TOGETHER = ("potions", "repeated", "sharded", "fsdp1", "concurrent", "planner", "facts")
LAST = ("qwen2.5-7b", "hypergradients", "generation")


def main() -> None:
    """Runs the parts that are asked for."""
    parser = argparse.ArgumentParser(description="Checks this package on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="new folder for report and logs")
    parser.add_argument("--runs", type=Path, help="folder for runs; default OUT/runs")
    parser.add_argument("--seconds", type=float, default=520.0, help="limit for all parts")
    parser.add_argument("--toy", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--parts", nargs="+", help="these only")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    check = Check(
        options.out, options.runs or options.out / "runs", options.seconds, toy=options.toy
    )
    parts = parts_of(check)
    wanted = [name for name in parts if options.parts is None or name in options.parts]
    if not wanted:
        sys.exit(f"--parts must be some of {', '.join(parts)}.")
    check.part("environment", _environment)

    def at_once(pool: ThreadPoolExecutor, names: Sequence[str]) -> None:
        for name in (one for one in names if one in wanted):
            pool.submit(check.part, name, parts[name])

    with ThreadPoolExecutor(len(ASIDE)) as beside:
        at_once(beside, ASIDE)
        for name in (one for one in FIRST if one in wanted):
            check.part(name, parts[name])
        with ThreadPoolExecutor(1 if options.toy else len(TOGETHER)) as pool:
            at_once(pool, TOGETHER)
        for name in (one for one in LAST if one in wanted):
            check.part(name, parts[name])
    print(json.dumps(check.report), flush=True)


def _environment() -> Any:
    from patcher_pl.reports.environment import environment

    return environment()


if __name__ == "__main__":
    main()

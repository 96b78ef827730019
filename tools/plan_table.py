"""The table of docs/planning.md: peak memory of Patcher on real models, and what fits where.

Plans every configuration under `configs/` that is named here, once; prints Markdown and keeps the JSON:

    python tools/plan_table.py --out plans/
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MODELS = ("qwen2.5-1.5b", "qwen3-4b", "llama3-8b", "llama3-70b")
# Devices and their memory in GiB, as in patcher_pl/planning/hardware.py.
MACHINES = (
    ("1 x 80 GB", 1, 79.6),
    ("1 x 141 GB", 1, 139.8),
    ("2 x 80 GB", 2, 79.6),
    ("8 x 80 GB", 8, 79.6),
    ("16 x 80 GB", 16, 79.6),
    ("64 x 80 GB", 64, 79.6),
)


def plan(model: str, out: Path) -> dict[str, Any]:
    """Plans one configuration; returns what the command wrote."""
    file = out / f"{model}.json"
    config = Path("configs", model, "patcher.yaml")
    command = [sys.executable, "-m", "patcher_pl", "plan", "--config", str(config)]
    done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True)
    if done.returncode not in (0, 2) or not file.exists():
        raise SystemExit(done.stderr)
    return json.loads(file.read_text(encoding="utf-8"))


def cell(found: dict[str, Any], num_devices: int, memory_gib: float) -> str:
    """The least demanding placement that fits so many devices, and what it needs of each."""
    budget = found["host_gib_per_device"] * 2**30 * num_devices
    for entry in found["alternatives"]:
        fits = entry["device_bytes"] <= memory_gib * 2**30 and entry["host_bytes"] <= budget
        if entry["num_devices"] == num_devices and fits:
            words = entry["placement"].split(", ", 1)[1:]
            how = words[0].replace("activation checkpointing", "AC") if words else "plain"
            return f"{entry['device_bytes'] / 2**30:.0f} ({how})"
    return "no"


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    plans = {model: plan(model, options.out) for model in MODELS}
    print("| model | parameters | one device, GiB | FLOPs | dtype | hours |")
    print("|---|---:|---:|---:|---|---:|")
    for model, found in plans.items():
        time = found["time"]
        print(
            f"| {model} | {found['num_parameters'] / 1e9:.2f} B "
            f"| {found['configured']['device_bytes'] / 2**30:.0f} "
            f"| {found['work_per_device']['flops']:.2e} | {time['dtype']} | {time['hours']:.0f} |"
        )
    print("\n| model | " + " | ".join(name for name, _, _ in MACHINES) + " |")
    print("|---|" + "---|" * len(MACHINES))
    for model, found in plans.items():
        cells = [cell(found, count, memory) for _, count, memory in MACHINES]
        print(f"| {model} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

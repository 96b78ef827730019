"""The tables of docs/planning.md: peak memory of Patcher on real models, and what fits where.

Plans the shipped configurations of some models, once each; prints Markdown and keeps the JSON:

    python tools/plan_table.py --out plans/
"""

import argparse
from pathlib import Path

from patcher_pl.cli.plan import PlanCLI
from patcher_pl.files import write_json
from patcher_pl.planning import GPUS, Plan, make_plan

MODELS = ("qwen2.5-1.5b", "qwen3-4b", "llama3-8b", "llama3-70b")
MACHINES = [(1, GPUS["H100-80GB"]), (1, GPUS["H200-141GB"])] + [
    (count, GPUS["H100-80GB"]) for count in (2, 8, 16, 64)
]


def cell(plan: Plan, num_devices: int, memory_bytes: int) -> str:
    """The least demanding placement that fits so many devices, and what it needs of each."""
    host_bytes = plan.host_gib_per_device * 2**30 * num_devices
    for need in plan.alternatives:
        fits = need.device_bytes <= memory_bytes and need.host_bytes <= host_bytes
        if need.placement.num_devices == num_devices and fits:
            how = ", ".join(str(need.placement).split(", ")[1:]) or "plain"
            how = how.replace("activation checkpointing", "AC")
            return f"{need.device_bytes / 2**30:.0f} ({how})"
    return "no"


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    sizes = ["| model | parameters | one device, GiB | FLOPs | dtype | hours |"]
    sizes.append("|---|---:|---:|---:|---|---:|")
    names = [f"{count} x {gpu.name.split('-')[1].replace('GB', ' GB')}" for count, gpu in MACHINES]
    fits = ["| model | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for model in MODELS:
        cli = PlanCLI(["--config", f"configs/{model}/patcher.yaml"])
        plan = make_plan(cli.planned_run, cli.settings)
        write_json(out / f"{model}.json", plan.as_dict())
        sizes.append(
            f"| {model} | {plan.num_parameters / 1e9:.2f} B "
            f"| {plan.configured.device_bytes / 2**30:.0f} "
            f"| {plan.work.flops:.2e} | {plan.dtype} | {plan.hours:.0f} |"
        )
        cells = [cell(plan, count, gpu.memory_bytes) for count, gpu in MACHINES]
        fits.append(f"| {model} | " + " | ".join(cells) + " |")
    print("\n".join([*sizes, "", *fits]))


if __name__ == "__main__":
    main()

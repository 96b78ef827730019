"""The tables of docs/planning.md on number formats: bytes per weight of every combination, and what 8B needs.

Plans and measures `fit` of Patcher on 60 million parameters on a CPU, as `tools/check_planner.py` does, once per
combination of the formats of weights, of the defender's moments and of the attacker's; then plans Llama-3-8B with
each. Keeps what it has found and goes on from there:

    python -m tools.plan_states --out plans/
"""

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from patcher_pl.cli.plan import PlanCLI
from patcher_pl.files import write_json
from patcher_pl.planning import GPUS, make_plan
from patcher_pl.planning.tracker import Part
from tools.check_planner import ATTACKERS, DEFENDERS, DTYPES, Formats, compare
from tools.plan_table import cell

CONFIG = "configs/llama3-8b/patcher.yaml"
COUNTS = (1, 2, 8)
GPU = GPUS["H100-80GB"]


def measured(size: str, formats: Formats) -> dict[str, Any]:
    """Plans and measures one combination."""
    with tempfile.TemporaryDirectory() as folder:
        return compare(Path(folder), size, "FirstOrder", formats=formats)


def planned_8b(formats: Formats) -> dict[str, Any]:
    """What fits 1, 2 and 8 GPUs, in words."""
    of_model, of_attacker = "--model.init_args.", "--model.init_args.attacker.init_args.optimizer."
    options = [
        f"{of_model}language_model.dtype={formats.dtype}",
        f"--device_counts={list(COUNTS)}",
    ]
    if formats.attacker != "float32":
        options.append(f"{of_attacker}init_args.fused=false")
        options.append(f"{of_attacker}init_args.state_dtype={ATTACKERS[formats.attacker]}")
    if formats.defender != "float32":
        options.append(f"{of_model}optimizer={DEFENDERS[formats.defender]}")
    cli = PlanCLI(["--config", CONFIG, *options])
    plan = make_plan(cli.planned_run, cli.settings)
    # Sharded weights in half precision are refused by `fit`: `param_dtype` computes in it.
    counts = COUNTS if formats.dtype == "float32" else COUNTS[:1]
    return {
        "configured_gib": plan.configured.device_bytes / 2**30,
        **{str(count): cell(plan, count, GPU.memory_bytes) for count in counts},
    }


def row_of_small(formats: Formats, found: dict[str, Any]) -> str:
    """Bytes per weight, as a row of the first table."""
    count, parts = found["num_parameters"], found["planned_bytes_by_part"]
    sides = [
        parts.get(part, 0) / count for part in (Part.DEFENDER_OPTIMIZER, Part.ATTACKER_OPTIMIZER)
    ]
    peaks = [found[name] * 2**20 / count for name in ("planned_mib", "measured_mib")]
    cells = [f"{value:.2f}" for value in (*sides, *peaks)] + [f"{found['ratio']:.3f}"]
    return "| " + " | ".join([*vars(formats).values(), *cells]) + " |"


def row_of_8b(formats: Formats, found: dict[str, Any]) -> str:
    """What fits, as a row of the second table."""
    cells = [
        f"{found['configured_gib']:.0f}",
        *(found.get(str(count), "refused") for count in COUNTS),
    ]
    return "| " + " | ".join([*vars(formats).values(), *cells]) + " |"


MAKERS = {"small": lambda formats: measured("60M", formats), "8b": planned_8b}
ROWS = {"small": row_of_small, "8b": row_of_8b}
HEADINGS = {
    "small": [
        "defender's optimizer, B per weight",
        "attacker's",
        "peak planned",
        "measured",
        "ratio",
    ],
    "8b": ["one device, GiB", *(f"{count} x 80 GB" for count in COUNTS)],
}


def main() -> None:
    """Fills the tables, and prints what they hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tables", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--only", nargs="+", help="combinations, as float32-8bit-bfloat16")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for table in options.tables:
        lines = []
        for chosen in product(DTYPES, DEFENDERS, ATTACKERS):
            name, formats = "-".join(chosen), Formats(*chosen)
            file = options.out / f"{table}-{name}.json"
            if not file.exists() and (options.only is None or name in options.only):
                write_json(file, MAKERS[table](formats))
                print(file, flush=True)
            if file.exists():
                found = json.loads(file.read_text(encoding="utf-8"))
                lines.append(ROWS[table](formats, found))
        names = ["weights", "defender's moments", "attacker's moments"]
        right = ["---"] * len(names) + ["---:"] * len(HEADINGS[table])
        print("| " + " | ".join([*names, *HEADINGS[table]]) + " |")
        print("\n".join(["|" + "|".join(right) + "|", *lines]), flush=True)


if __name__ == "__main__":
    main()

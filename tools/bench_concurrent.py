"""Wall-clock and robustness of Patcher's parallel form against its sequential one, on the testbed.

Runs `fit` with configs/testbed/concurrent.yaml, and the same with its attacker in between, in turn
for every seed: one CPU thread per process, so that two free cores are needed. Prints a table and, as
its last line, JSON:

    python tools/bench_concurrent.py --seeds 0 1 2 3 4 --out bench.json

Wall-clock is that of training, from the first step to the last, waiting for the attacker to start
included; imports, export and red team are not. `attack_share` says how well both sides are balanced:
0.5 if the sequential run attacks for as long as it defends. The ASR curves are those of a red team
with data that training never saw.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "testbed" / "concurrent.yaml"
FORMS = ("sequential", "concurrent")


def settings(form: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Configuration of one run."""
    content = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    redteam = CONFIG.parent / content["redteam"]
    content["redteam"] = yaml.safe_load(redteam.read_text(encoding="utf-8")) | {"seeds": [seed]}
    content |= {"seed_everything": seed, "control": False}
    content["trainer"] |= {"max_steps": options.max_steps, "log_every_n_steps": 1}
    content["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False}
    defense = content["model"]["init_args"]
    defense["refresh_every"] = options.k2
    concurrent = defense["attacker"]["init_args"]
    # Every theta is attacked, as in the sequential run, and its vector used one round later.
    concurrent["max_staleness"] = 2 * options.k2 - 1
    attacker = concurrent["population"][0]["attacker"]
    attacker["init_args"]["num_steps"] = options.k1
    if form == "sequential":
        defense["attacker"] = attacker
    return content


def measure(form: str, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Runs one `fit`."""
    run_dir = folder / f"{form}-{seed}"
    run_dir.mkdir(parents=True)
    config = run_dir / "bench.yaml"
    config.write_text(yaml.safe_dump(settings(form, seed, options)), encoding="utf-8")
    command = [sys.executable, "-m", "patcher_pl", "fit", "--config", str(config)]
    with (run_dir / "log.txt").open("wb") as log:
        subprocess.run(
            [*command, "--run_dir", str(run_dir)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
        )
    curve = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))["curves"][0]
    return {
        "form": form,
        "seed": seed,
        **timings(form, run_dir, options),
        "attack_steps": curve["attack_steps"],
        "asr": curve["asr"],
        "benign_accuracy": curve["benign_accuracy"],
        "steps_to_break": curve["steps_to_break"],
    }


def timings(form: str, run_dir: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Reads the clock from what the run has logged after every step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard" / "patcher"), {"scalars": 0}).Reload()
    clock = {point.step: point.wall_time for point in events.Scalars("train/loss_safe")}
    steps = {step: clock[step] - clock[step - 1] for step in sorted(clock)[1:]}
    refreshed = {point.step + 1 for point in events.Scalars("attack/loss")}
    usual = statistics.median(steps[step] for step in steps if step > max(refreshed) - options.k2)
    training_s = sum(steps.values())
    first = min(refreshed)
    attacks_s = sum(steps[step] - usual for step in refreshed)
    result = {"training_s": training_s, "num_attacks": len(refreshed)}
    if form == "sequential":
        defense_s = usual * (options.max_steps - first)
        result["attack_share"] = attacks_s / (attacks_s + defense_s)
    else:
        result["waiting_for_the_first_attack_s"] = steps[first] - usual
    tags = events.Tags()["scalars"]
    for tag in ("staleness", "attacker_utilization", "defender_utilization", "overlap_gained_s"):
        if f"concurrent/{tag}" in tags:
            values = [point.value for point in events.Scalars(f"concurrent/{tag}")]
            result[tag] = values[-1] if tag.endswith("_s") else statistics.mean(values)
    return result


def summarized(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Paired ratios, and the ASR curves of both forms over the seeds."""
    of = {(row["form"], row["seed"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    pairs = [(of["sequential", seed], of["concurrent", seed]) for seed in seeds]
    wall = [beside["training_s"] / between["training_s"] for between, beside in pairs]
    summary: dict[str, Any] = {
        "ratios": {"wall_concurrent_over_sequential": statistics.median(wall)},
        "wall_ratios": wall,
        "attack_share": statistics.median(between["attack_share"] for between, _ in pairs),
    }
    for form in FORMS:
        own = [of[form, seed] for seed in seeds]
        asr = list(zip(*(row["asr"] for row in own), strict=True))
        summary[form] = {
            "attack_steps": own[0]["attack_steps"],
            "asr_mean": [statistics.mean(rates) for rates in asr],
            "asr_range": [[min(rates), max(rates)] for rates in asr],
            "steps_to_break": [row["steps_to_break"] for row in own],
        }
    return summary


def main() -> None:
    """Runs both forms for every seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--k1", type=int, default=108, help="steps of the simulated attack")
    parser.add_argument("--k2", type=int, default=50, help="defender steps between refreshes")
    parser.add_argument("--max_steps", type=int, default=1500, help="defender steps of a run")
    parser.add_argument("--keep", type=Path, help="keep the runs in this new folder")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        for number, seed in enumerate(options.seeds):
            # Alternately, so that whatever else the machine does falls on both.
            for form in FORMS if number % 2 == 0 else FORMS[::-1]:
                rows.append(row := measure(form, seed, folder, options))
                print(
                    f"seed {seed}  {form:10s}  training {row['training_s']:6.1f} s  "
                    f"{row['num_attacks']} attacks  steps to break {row['steps_to_break']}",
                    flush=True,
                )
    report = {
        **summarized(rows),
        "rows": rows,
        "settings": {name: getattr(options, name) for name in ("k1", "k2", "max_steps", "seeds")},
    }
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()

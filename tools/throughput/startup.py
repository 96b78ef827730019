"""How long commands take to say what they can do, against importing Lightning alone.

python tools/bench_throughput.py --only startup
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
YARDSTICK = "import_lightning"
_PROGRAM = ("-m", "patcher_pl")
COMMANDS: Mapping[str, Sequence[str]] = {
    YARDSTICK: ("-c", "import lightning"),
    "help": (*_PROGRAM, "--help"),
    "report_help": (*_PROGRAM, "report", "--help"),
    "redteam_help": (*_PROGRAM, "redteam", "--help"),
    "fit_help": (*_PROGRAM, "fit", "--help"),
    "fit_print_config": (
        *(*_PROGRAM, "fit", "--config", "configs/testbed/patcher.yaml"),
        *("--run_dir", "runs/never", "--print_config"),
    ),
}


def measure(
    *, num_rounds: int = 5, commands: Mapping[str, Sequence[str]] = COMMANDS
) -> dict[str, Any]:
    """Starts every command once per round, in turn, each in a process of its own.

    Args:
        num_rounds: Starts of each command that are timed (count); one goes before, to fill caches.
        commands: Arguments of Python by name; `import_lightning` is what the others are divided by.

    Returns:
        `ratios.startup_NAME` and `ratios.startup_NAME_cpu`: seconds of the command over those of
        `import lightning` in the same round, median of the rounds, by wall clock and of CPU; below 1
        is faster. `wall_s` and `cpu_s`: medians by name.
    """
    wall: dict[str, list[float]] = {name: [] for name in commands}
    cpu: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(-1, num_rounds):
        for name, arguments in commands.items():
            took = _start(arguments)
            if number >= 0:
                wall[name].append(took[0])
                cpu[name].append(took[1])
    ratios = {}
    for suffix, times in (("", wall), ("_cpu", cpu)):
        for name in commands:
            if name != YARDSTICK:
                pairs = zip(times[name], times[YARDSTICK], strict=True)
                ratio = statistics.median(ours / theirs for ours, theirs in pairs)
                ratios[f"startup_{name}{suffix}"] = ratio
    return {
        "ratios": ratios,
        "wall_s": {name: statistics.median(times) for name, times in wall.items()},
        "cpu_s": {name: statistics.median(times) for name, times in cpu.items()},
        "num_rounds": num_rounds,
    }


def _start(arguments: Sequence[str]) -> tuple[float, float]:
    """Returns wall and CPU seconds of one process."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=True)
    wall, after = time.perf_counter() - began, os.times()
    user = after.children_user - before.children_user
    return wall, user + after.children_system - before.children_system

"""A red team of one attack and two seeds, and what it found."""

import json
from pathlib import Path
from typing import Any

from tests.commands import redteam_settings


def attack_settings(inputs: Path, model: Path, run_dir: Path) -> dict[str, Any]:
    redteam = redteam_settings(inputs) | {"seeds": [0, 1]}
    common = {"device": "cpu", "num_threads": 1, "redteam": redteam}
    return {"run_dir": str(run_dir), "model": str(model), **common}


def measured(run_dir: Path) -> list[Any]:
    curves = json.loads((run_dir / "results.json").read_text())["curves"]
    assert len(curves) == 2
    keys = ("attack", "seed", "attack_steps", "asr", "benign_accuracy", "error")
    return [[curve[key] for key in keys] for curve in curves]

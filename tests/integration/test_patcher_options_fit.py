"""`fit` and `plan` with options of Patcher, named in YAML alone; each must be usable by its line."""

import json
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.commands import cli, patcher_settings, write_rows, write_yaml


def options_of(name: str, benign: str) -> dict[str, Any]:
    """Settings of the defense and of its attacker, by option."""
    points = {"attacker": {"init_args": {"vector_steps": [1, 2]}}}
    data = {"sources": [{"path": benign}]}

    def retain(kind: str, **weights: float) -> dict[str, Any]:
        path = f"patcher_pl.defenses.retention.{kind}"
        return {"retain": {"class_path": path, "init_args": {"data": data, **weights}}}

    return {
        "points": points,
        "in-turn": {**points, "combine_points": "in_turn"},
        "at-random": {**points, "combine_points": "at_random"},
        "kl": retain("KLToBase"),
        "states": retain("RepresentationDistance", weight=0.5, attacked_weight=0.5),
        "both": {**points, **retain("KLToBase", attacked_weight=1.0)},
    }[name]


NAMES = ["points", "in-turn", "at-random", "kl", "states", "both"]


def settings(inputs, folder, name):
    """Two plain steps, an attack, and two steps after it."""
    found = patcher_settings(inputs)
    found["trainer"]["max_steps"] = 4
    if name is not None:
        rows = [{"prompt": f"Draught {n}?", "response": "Stir well."} for n in range(9)]
        benign = write_rows(folder / "benign.jsonl", rows)
        arguments = found["model"]["init_args"]
        options = options_of(name, str(benign))
        arguments["attacker"]["init_args"] |= options.pop("attacker", {}).get("init_args", {})
        arguments |= options
    return found


@pytest.fixture(scope="module")
def paper(inputs, tmp_path_factory):
    """Weights of a run without any option."""
    folder = tmp_path_factory.mktemp("paper")
    config = write_yaml(folder / "config.yaml", settings(inputs, folder, None))
    cli("fit", "--config", config, "--run_dir", folder / "run").expect(0)
    return load_file(folder / "run" / "model" / "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.long
def test_one_hardened_model_per_option(inputs, tmp_path, paper, name):
    config = write_yaml(tmp_path / "config.yaml", settings(inputs, tmp_path, name))
    run_dir = tmp_path / "run"
    cli("fit", "--config", config, "--run_dir", run_dir).expect(0)
    weights = load_file(run_dir / "model" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert any(not torch.equal(tensor, paper[key]) for key, tensor in weights.items())
    assert weights.keys() == paper.keys()
    # What was written of the configuration makes the same run.
    written = yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["init_args"]
    assert (written["attacker"]["init_args"]["vector_steps"] is None) == (name in ("kl", "states"))
    assert (written["retain"] is None) == (name in ("points", "in-turn", "at-random"))
    cli("fit", "--config", run_dir / "config.yaml", "--run_dir", tmp_path / "again").expect(0)
    again = load_file(tmp_path / "again" / "model" / "model.safetensors")
    assert all(torch.equal(tensor, weights[key]) for key, tensor in again.items())


@pytest.mark.slow
def test_a_plan_counts_what_options_cost(inputs, tmp_path):
    """Of all options together: as many gradients as the run takes."""
    config = write_yaml(tmp_path / "config.yaml", settings(inputs, tmp_path, "both"))
    run_dir, plan = tmp_path / "run", tmp_path / "plan.json"
    asked = ("--json", plan, "--device_counts", "[1]", "--length", "16")
    cli("plan", "--config", config, "--run_dir", run_dir, *asked).expect(0)
    cli("fit", "--config", config, "--run_dir", run_dir).expect(0)
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    spent = checkpoint["defense"]["cost"]["gradient_evaluations"]
    # At theta 2 in all 4 steps, at two points 2 each in 2 steps, and 2 attack steps.
    assert spent == 4 * 2 + 2 * 2 * 2 + 2
    planned = json.loads(plan.read_text())["work_per_device"]["gradient_evaluations"]
    assert planned == spent

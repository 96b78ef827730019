"""PEFT adapters under attack."""

from dataclasses import replace

from safetensors.torch import load_file, save_file

from patcher_pl.cli.redteam import run_redteam
from patcher_pl.models import Lora
from patcher_pl.optim import AdamW
from patcher_pl.redteam import FullFinetuning, LoraFinetuning
from tests.adapters import base_and_adapter


def test_every_attack_starts_from_the_release(red_team, tmp_path):
    """Wrong if, as before, one attack met the adapter and another one the bare base."""
    base, adapter = base_and_adapter(tmp_path)
    attacks = [
        FullFinetuning(optimizer=AdamW(lr=1e-3), attack_steps=[0]),
        LoraFinetuning(optimizer=AdamW(lr=1e-3), attack_steps=[0], lora=Lora(rank=2)),
    ]
    team = replace(red_team, attacks=attacks, seeds=[0])
    run = tmp_path / "run"
    full, lora = run_redteam(team, run, str(adapter), device="cpu").curves
    assert full.samples == lora.samples
    bare = run_redteam(team, tmp_path / "bare", str(base), device="cpu").curves[0]
    assert [one.answer for one in bare.samples] != [one.answer for one in full.samples]
    # Wrong if another base under the same adapter passed for the same model.
    run_redteam(team, run, str(adapter), device="cpu")
    assert len(list((run / "cells").rglob("*.json"))) == 2
    weights = base / "model.safetensors"
    changed = {name: tensor + 0.01 for name, tensor in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    run_redteam(team, run, str(adapter), device="cpu")
    assert len(list((run / "cells").rglob("*.json"))) == 4

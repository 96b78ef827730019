"""What the project claims, on the testbed: minutes of work, so only with `pytest -m slow`."""

import pytest
import torch

from patcher_pl.reports import Results
from tests.commands import QUIET, ROOT, cli

pytestmark = pytest.mark.slow


def load_cost(run_dir):
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["defense"]["cost"]["gradient_evaluations"]


def test_patcher_withstands_three_times_as_long_as_sft(tmp_path):
    """The README's first command: same gradient evaluations, useful models, a longer attack."""
    quiet = [f"--trainer.{key}={str(value).lower()}" for key, value in QUIET.items()]
    config = ROOT / "configs" / "testbed" / "patcher.yaml"
    cli("fit", "--config", config, "--run_dir", tmp_path, *quiet).expect(0)
    curves = {curve.defense: curve for curve in Results.load(tmp_path / "results.json").curves}
    patcher, sft = curves["patcher"], curves["sft"]
    assert load_cost(tmp_path) == load_cost(tmp_path / "control")
    for curve in (patcher, sft):
        assert curve.error is None
        assert curve.asr[0] == 0.0
        assert curve.benign_accuracy[0] >= 0.98
    assert sft.steps_to_break is not None
    longest = 2 * patcher.attack_steps[-1]
    assert (patcher.steps_to_break or longest) >= 3 * sft.steps_to_break

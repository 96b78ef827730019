"""The red team's command makes the models that it attacks, once, and says what it cannot make."""

import pytest

from patcher_pl.redteam import Target
from patcher_pl.reports import Results
from tests.commands import cli, patcher_settings, redteam_settings, write_yaml


def test_both_models_come_from_one_fit_that_is_not_repeated(inputs, tmp_path, fits_in_this_process):
    """Wrong if a red team attacked stale models, or trained them again for every new attack."""
    write_yaml(tmp_path / "patcher.yaml", patcher_settings(inputs) | {"control": True})
    team = redteam_settings(inputs)
    settings = {
        "redteam": team,
        "models": [
            {
                "defense": "sft",
                "fit": "patcher.yaml",
                "control": True,
            },  # beside the red team's file
            {"defense": "patcher", "fit": "patcher.yaml", "k1": 2},
        ],
        "fit_options": {"trainer.max_steps": 4},
        "device": "cpu",
        "num_threads": 1,
    }
    config, run_dir = write_yaml(tmp_path / "redteam.yaml", settings), tmp_path / "run"
    cli("redteam", "--config", config, "--run_dir", run_dir).expect(0)
    curves = Results.load(run_dir / "results.json").curves
    assert [(curve.defense, curve.k1, curve.error) for curve in curves] == [
        ("sft", None, None),
        ("patcher", 2, None),
    ]
    weights = run_dir / "hardened" / "patcher" / "model" / "model.safetensors"
    made = weights.stat().st_mtime_ns
    write_yaml(config, settings | {"redteam": team | {"seeds": [0, 1]}})
    cli("redteam", "--config", config, "--run_dir", run_dir).expect(0)
    assert len(Results.load(run_dir / "results.json").curves) == 4
    assert weights.stat().st_mtime_ns == made

    # Both go back to what `fit` began with, and are then the same model.
    strip = {"class_path": "patcher_pl.redteam.DeltaStrip"}
    write_yaml(config, settings | {"redteam": team | {"attacks": [*team["attacks"], strip]}})
    cli("redteam", "--config", config, "--run_dir", run_dir).expect(0)
    one, other = (
        curve
        for curve in Results.load(run_dir / "results.json").curves
        if curve.attack == "delta_strip_0"
    )
    assert one.error is other.error is None
    assert one.samples == other.samples
    assert "differ" in one.remarks[0]


@pytest.mark.slow
def test_a_control_that_nobody_trained_is_named(inputs, tmp_path):
    write_yaml(tmp_path / "patcher.yaml", patcher_settings(inputs))
    target = {"defense": "sft", "fit": "patcher.yaml", "control": True}
    settings = {"redteam": redteam_settings(inputs), "models": [target], "device": "cpu"}
    config = write_yaml(tmp_path / "redteam.yaml", settings)
    outcome = cli("redteam", "--config", config, "--run_dir", tmp_path / "run").expect(2)
    assert "`control: true` takes a `fit` with a control" in outcome.err


def test_models_that_cannot_be_told_apart_are_refused(inputs, tmp_path):
    model = str(inputs / "model")
    targets = [{"defense": "sft", "path": model}, {"defense": "sft", "path": model}]
    settings = {"redteam": redteam_settings(inputs), "models": targets}
    config = write_yaml(tmp_path / "redteam.yaml", settings)
    outcome = cli("redteam", "--config", config, "--run_dir", tmp_path / "run").expect(2)
    assert "models must differ in defense, k1 or train_seed" in outcome.err
    both = cli("redteam", "--config", config, "--run_dir", tmp_path, "--model", model).expect(2)
    assert "model or models must be given, and not both" in both.err


def test_targets_are_checked():
    for fields, message in [
        ({}, r"Target\.path or Target\.fit must be given"),
        ({"path": "a", "control": True}, r"Target\.control must be false"),
    ]:
        with pytest.raises(ValueError, match=message):
            Target(defense="sft", **fields)
